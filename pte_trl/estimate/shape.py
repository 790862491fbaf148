"""What the layers of a model keep of a token and compute with, read off the model's modules.

    shape = shape_of(config)
    shape.layers[0].cached         # elements that a token leaves in the cache of the first layer

Configurations name their sizes differently from family to family, and modules do not: the width of the keys is that
of the linear that makes them. So the model is built once without memory, wrapped or not, and looked at.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from pte_trl.compat.transformers import layer_types
from pte_trl.models.weights import without_memory

ATTENDING = ("full_attention", "sliding_attention", "chunked_attention", "hybrid", "hybrid_sliding")
RECURRENT = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
EMPTY = ("mlp", "moe")  # layers without a cache
OUTPUTS = ("o_proj", "out_proj", "dense")  # names of the linear that follows attention
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ROUTED = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")


class NotEstimated(ValueError):
    """One sentence: of which model, and why."""

    def __init__(self, config, why: str):
        super().__init__(f"not estimated for {getattr(config, 'model_type', None)}: {why}")


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Widths are elements of one token, all heads together; 0 where there is no such part.

    Attributes:
        kind: of transformers' layer types.
        query: of the queries.
        output: of what attention gives, for all query heads.
        keys: of keys and values together, as attention computes with them.
        cached: of what the cache keeps of a token: keys and values, or the latents of MLA.
        window: tokens that a query of a sliding or chunked layer sees at most, itself among them; None: all.
        conv, recurrent: elements of the states of one sample, whatever its length. Recurrent ones are float32.
        inner: I of a gated MLP with as many weights as a token goes through.
        routed: experts that a token goes through.
        experts: that there are.
    """

    kind: str
    query: int = 0
    output: int = 0
    keys: int = 0
    cached: int = 0
    window: int | None = None
    conv: int = 0
    recurrent: int = 0
    inner: float = 0.0
    routed: int = 0
    experts: int = 0

    @property
    def bounded(self) -> bool:
        """Whether the window of a cache policy applies to it."""
        return self.kind in ("full_attention", "hybrid") and self.cached > 0

    def kept(self, tokens: int) -> int:
        """Of so many tokens those that its cache keeps for the next one, where the policy has evicted none of them."""
        return tokens if self.window is None else min(tokens, self.window - 1)


@dataclass(frozen=True)
class Shape:
    """Hidden size, vocabulary, and the decoder layers in order."""

    hidden: int
    vocabulary: int
    layers: tuple[Layer, ...]

    def widest(self, name: str) -> float:
        return max(getattr(layer, name) for layer in self.layers)


SHAPES: dict[str, Shape | NotEstimated] = {}  # building a model takes half a second


def shape_of(config: PretrainedConfig) -> Shape:
    """The shape of the language model that a configuration describes, within a multimodal one, too.

    Raises:
        NotEstimated: a model that cannot be built, or a layer of a form that is not known.
    """
    key = config.to_json_string()
    if key not in SHAPES:
        try:
            SHAPES[key] = _read(config)
        except NotEstimated as error:
            SHAPES[key] = error
    found = SHAPES[key]
    if isinstance(found, NotEstimated):
        raise found
    return found


def _read(config: PretrainedConfig) -> Shape:
    text = config.get_text_config(decoder=True)
    try:
        with without_memory():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        layers = list(model.get_decoder().layers)
        kinds = layer_types(config)
    except Exception as error:  # of any kind: a model's class is a program of its own
        why = " ".join(str(error).split())[:120]
        raise NotEstimated(config, f"its decoder layers are not found ({type(error).__name__}: {why})") from error
    found = []
    for index, layer in enumerate(layers):
        # Layers at the end that use the keys and values of earlier ones have no cache of their own.
        kind = kinds[index] if index < len(kinds) else None
        found.append(_layer(config, text, layer, kind))
    return Shape(text.hidden_size, text.vocab_size, tuple(found))


def _layer(config, text, layer: nn.Module, kind: str | None) -> Layer:
    sizes, apart = {}, set()
    if kind is not None and kind not in (*ATTENDING, *RECURRENT, *EMPTY):
        raise NotEstimated(config, f"it has layers of the kind {kind}")
    if kind is None or kind in ATTENDING:
        name, attention = _attention(config, layer)
        apart.add(name)
        sizes |= _widths(config, text, attention)
        if kind is None:
            sizes["cached"] = 0
    if kind in RECURRENT:
        name, mixer = _mixer(config, layer)
        apart.add(name)
        sizes |= _states(text, mixer)
    if kind in ("sliding_attention", "hybrid_sliding"):
        sizes["window"] = text.sliding_window
    elif kind == "chunked_attention":
        sizes["window"] = text.attention_chunk_size
    return Layer(kind or "shared", **sizes, **_mlp(config, text, layer, apart))


def _attention(config, layer: nn.Module) -> tuple[str, nn.Module]:
    for name, module in layer.named_modules():
        if type(module).__name__.endswith("Attention") and any(hasattr(module, each) for each in OUTPUTS):
            return name, module
    raise NotEstimated(config, "the attention of its layers is not found")


def _widths(config, text, attention: nn.Module) -> dict[str, int]:
    linears = {name: module for name, module in attention.named_children() if hasattr(module, "out_features")}
    output = next(linears[name] for name in OUTPUTS if name in linears).in_features
    if "kv_a_proj_with_mqa" in linears:  # MLA: the cache has latents, attention what they expand to
        query = text.num_attention_heads * (text.qk_nope_head_dim + text.qk_rope_head_dim)
        cached = linears["kv_a_proj_with_mqa"].out_features
        return {"query": query, "output": output, "keys": query + output, "cached": cached}
    if "k_proj" in linears:
        keys = linears["k_proj"].out_features
        keys += linears.get("v_proj", linears["k_proj"]).out_features
    elif "qkv_proj" in linears:
        keys = linears["qkv_proj"].out_features - output
    elif hasattr(attention, "q_proj"):  # the layer uses the keys and values of another one
        keys = 0
    else:
        raise NotEstimated(config, "its attention has neither k_proj nor qkv_proj")
    return {"query": output, "output": output, "keys": keys, "cached": keys}


def _mixer(config, layer: nn.Module) -> tuple[str, nn.Module]:
    for name, module in layer.named_modules():
        if hasattr(module, "conv_kernel_size"):
            return name, module
    raise NotEstimated(config, "the recurrent part of its layers is not found")


def _states(text, mixer: nn.Module) -> dict[str, int]:
    """Of a short convolution, a Mamba-2 mixer or a gated delta network."""
    recurrent = 0
    if hasattr(mixer, "ssm_state_size"):
        heads = getattr(mixer, "num_heads", None)
        width = heads * mixer.head_dim if heads else mixer.intermediate_size
        recurrent = width * mixer.ssm_state_size
    elif hasattr(mixer, "num_v_heads"):
        recurrent = mixer.num_v_heads * mixer.head_k_dim * mixer.head_v_dim
    conv = getattr(mixer, "conv_dim", text.hidden_size) * mixer.conv_kernel_size
    return {"conv": conv, "recurrent": recurrent}


def _mlp(config, text, layer: nn.Module, apart: set[str]) -> dict:
    """The weights outside attention and mixer, as those of a gated MLP of three matrices."""
    dense = routed = 0
    experts = _first(text, EXPERTS)
    for name, weight in _weights(layer, apart):
        parts = name.split(".")
        if "experts" in parts:
            routed += weight.numel()
        elif not ({"gate", "router"} & set(parts) and weight.shape[0] == experts):
            dense += weight.numel()
    if not routed:
        return {"inner": dense / (3 * text.hidden_size)}
    per_token = _first(text, ROUTED)
    if not (experts and per_token):
        raise NotEstimated(config, "its configuration does not say how many experts a token goes through")
    inner = (dense + routed * per_token / experts) / (3 * text.hidden_size)
    return {"inner": inner, "routed": per_token, "experts": experts}


def _weights(layer: nn.Module, apart: set[str]) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in layer.named_parameters():
        if parameter.dim() > 1 and not any(name.startswith(f"{each}.") for each in apart):
            yield name, parameter


def _first(text, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if (value := getattr(text, name, None))), None)
