"""What an attention module's projections give: sizes of queries, keys and values, and the queries of global tokens."""

from torch import Tensor, nn

from pte_trl.adapter.placement import named, unwrapped


def head_width(attention: nn.Module) -> int:
    """head_dim of queries and keys."""
    config = attention.config
    own = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads


def heads_and_widths(attention: nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """(heads, width of a head) of the keys that PTE encodes, and of the values."""
    if compressed(attention):
        return (attention.num_heads, attention.qk_head_dim), (attention.num_heads, attention.v_head_dim)
    width = head_width(attention)
    keys, values = (getattr(attention, name, None) for name in ("k_proj", "v_proj"))
    if keys is None:
        heads = attention.config.num_key_value_heads
        return (heads, width), (heads, width)
    values = keys if values is None else values  # values may be made of the keys
    heads = unwrapped(keys).out_features // width
    return (heads, width), (heads, unwrapped(values).out_features // heads)  # a value may have a width of its own


def hidden_width(attention: nn.Module) -> int:
    """d_model, the width of what comes into the layer."""
    first = getattr(attention, "q_a_proj", None)
    return (query_projection(attention) if first is None else first).in_features


def query_width(attention: nn.Module) -> int:
    """Features of all queries together."""
    width = query_projection(attention).out_features
    if fused(attention):
        return width - sum(heads * size for heads, size in heads_and_widths(attention))
    return width // 2 if _gated(attention) else width


def query_projection(attention: nn.Module) -> nn.Linear:
    """The base model's own."""
    return unwrapped(getattr(attention, named(attention, "q_proj")))


def fused(attention: nn.Module) -> bool:
    """Whether queries, keys and values are made by one linear, in this order."""
    return named(attention, "q_proj") == "qkv_proj"


def compressed(attention: nn.Module) -> bool:
    """Whether a cache holds something of which keys and values are made (multi-head latent attention)."""
    return hasattr(attention, "expand_kv")


def _gated(attention: nn.Module) -> bool:
    """Whether the second half of every query head gates the output."""
    heads = getattr(attention.config, "num_attention_heads", 0)
    return query_projection(attention).out_features == 2 * heads * head_width(attention)


def only_for_queries(attention: nn.Module) -> list[nn.Module]:
    """Linears that neither keys nor values need."""
    if fused(attention):
        return []
    names = ("q_a_proj", named(attention, "q_proj"))
    return [module for name in names if (module := getattr(attention, name, None)) is not None]


def only_for_keys_and_values(attention: nn.Module) -> list[nn.Module]:
    """Linears that nothing but keys and values needs; none where keys are compressed or made with the queries."""
    if compressed(attention):
        return []
    found = (getattr(attention, name, None) for name in ("k_proj", "v_proj"))
    return [module for module in found if module is not None]


def queries_of(attention: nn.Module, tokens: Tensor) -> Tensor:
    """(n, d_model) -> (n, d_q), by the base model's own projection, without a position.

    A norm of every head is part of it, as in Qwen3. Others are left out: what queries are is the projection's choice,
    and W_Q^a is learned on top.
    """
    if (down := getattr(attention, "q_a_proj", None)) is not None:
        tokens = attention.q_a_layernorm(down(tokens))
    queries = query_projection(attention)(tokens)
    if _gated(attention):
        queries = queries.unflatten(-1, (-1, 2, head_width(attention)))[..., 0, :].flatten(-2)
    queries = queries[..., : query_width(attention)]
    norm, width = getattr(attention, "q_norm", None), head_width(attention)
    if norm is not None and sum(weight.numel() for weight in norm.parameters()) == width:
        queries = norm(queries.unflatten(-1, (-1, width))).flatten(-2)
    return queries


def as_encoded(attention: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What a cache holds -> keys and values, (batch, heads, length, width) each."""
    return attention.expand_kv(keys, values) if compressed(attention) else (keys, values)


def rows(heads: Tensor) -> Tensor:
    """(batch, heads, length, width) -> (batch, length, heads * width), as the encoder takes it."""
    return heads.transpose(1, 2).flatten(2)
