"""A small random copy of an architecture: everything that decides how keys, masks and states flow, at little cost.

Kept are the kinds of layers, widths of heads, rotary, norms, biases, gates and scales; made small are how many of each
there are: layers, heads, experts, features of an MLP, tokens of the vocabulary.
"""

import copy
import re
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from pte_trl.compat.transformers import layer_types, set_zero3_state

HEADS, KEY_HEADS, EXPERTS, CHOSEN, MLP, VOCABULARY = 4, 2, 4, 2, 64, 64
OWN_WINDOW = 6  # tokens of a sliding window or a chunk: fewer than the self-test feeds
LAYERS = 2  # at least

# What a count is called, from family to family -> the most that is left of it.
MOST = {
    r".*intermediate_size.*|ffn_.*|.*_ffn_dim": MLP,
    r"(num|n|moe_num)_(\w+_)?experts": EXPERTS,
    r".*experts?_per_tok(en)?|moe_k|moe_topk|top_k_experts|router_top_k": CHOSEN,
    r"n_group": 2,
    r"topk_group|first_k_dense_replace": 1,
    r"linear_num_value_heads": 4,
    r"linear_num_key_heads|num_global_key_value_heads": KEY_HEADS,
    r"vocab_size.*": VOCABULARY,
    r"(mamba_)?chunk_size": 8,  # tokens that a recurrent layer takes together
    r"sliding_window|attention_chunk_size": OWN_WINDOW,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def reduced(config: PreTrainedConfig, heads: bool = True) -> PreTrainedConfig:
    """The configuration of a small copy.

    Args:
        config: of any decoder. Of one that also sees or hears, only what writes is copied.
        heads: whether the hidden size and the numbers of heads may be reduced.
    """
    found = copy.deepcopy(config.get_text_config(decoder=True))
    _cut_layers(found)
    for name, value in _counts(found):
        for pattern, most in MOST.items():
            if re.fullmatch(pattern, name):
                setattr(found, name, min(value, most))
    for name, token in TOKENS.items():
        setattr(found, name, token)
    if heads:
        _cut_heads(found)
    return found


def _counts(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    return ((name, x) for name, x in list(vars(config).items()) if type(x) is int)


def _cut_layers(config: PreTrainedConfig) -> None:
    """The shortest prefix of layers in which every kind of layer occurs."""
    count, kinds = config.num_hidden_layers, layer_types(config)
    # Lists with an entry for every layer: types, rotary or none, experts or none.
    lists = {name: x for name, x in vars(config).items() if isinstance(x, (list, tuple)) and len(x) == count}
    # A list of sizes has as many kinds as layers.
    telling = [x for x in lists.values() if len(set(map(str, x))) <= 4]
    layers = [tuple(map(str, each)) for each in zip(*telling, [*kinds, *[""] * (count - len(kinds))], strict=True)]
    every = set(layers)
    least = next(n for n in range(1, count + 1) if set(layers[:n]) == every)
    least = min(count, max(LAYERS, least))
    numbers = [name for name in vars(config) if name.endswith(("_layers", "_idxs", "_indices")) and name not in lists]
    for name in numbers:  # lists of layer numbers
        value = getattr(config, name)
        if isinstance(value, (list, tuple)) and all(type(x) is int for x in value):
            setattr(config, name, [x for x in value if x < least])
    for name, value in lists.items():
        setattr(config, name, value[:least])
    config.num_hidden_layers = least


def _cut_heads(config: PreTrainedConfig) -> None:
    heads, hidden = config.num_attention_heads, config.hidden_size
    width = getattr(config, "head_dim", None) or hidden // heads
    key_heads = getattr(config, "num_key_value_heads", None)
    config.num_attention_heads = HEADS
    if key_heads is not None:
        config.num_key_value_heads = HEADS if key_heads == heads else min(key_heads, KEY_HEADS)
    config.hidden_size = HEADS * width
    # State space layers divide `expand` times the hidden size into heads.
    size = getattr(config, "mamba_d_head", None)
    if getattr(config, "mamba_n_heads", None) and type(size) is int:
        inner = getattr(config, "mamba_expand", 2) * config.hidden_size
        config.mamba_n_heads = max(1, inner // size)
        if getattr(config, "mamba_d_ssm", None):
            config.mamba_d_ssm = config.mamba_n_heads * size
        config.mamba_n_groups = 1
    if getattr(config, "word_embed_proj_dim", None):
        config.word_embed_proj_dim = config.hidden_size


def small_copy(config: PreTrainedConfig, attention: str | None) -> nn.Module:
    """A model of a reduced configuration with random float32 weights, on the CPU, whatever the caller's context is.

    Args:
        attention: its attention implementation; None for transformers' choice.
    """
    own_code = type(config).__module__.startswith("transformers_modules")  # loaded, so trusted
    with torch.device("cpu"), set_zero3_state():
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention, trust_remote_code=own_code
        )
    randomise(model)
    return model.float().eval()


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights under which tokens, positions and layers tell in the result, and rounding does not grow in it."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        if id(parameter) in embeddings:
            parameter.normal_(std=0.25)
        elif parameter.dim() >= 2:
            parameter.normal_(std=0.85 * min(parameter.shape[-2:]) ** -0.5)
        else:  # norms, biases, decays: what the family starts with, and something of its own for every feature
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
