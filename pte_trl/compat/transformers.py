"""Private names of transformers."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import GenerationMixin, GradientCheckpointingLayer, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DynamicSlidingWindowLayer,  # what a decode keeps of a layer of sliding or chunked attention
    LinearAttentionLayer,  # and of a recurrent one
    get_layer_types_and_kwargs,
)
from transformers.generation.utils import GENERATION_MODES_MAPPING
from transformers.modeling_utils import set_zero3_state  # inside it ZeRO-3 leaves a model on the meta device alone
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # checkpoints are folders PREFIX-STEP
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,  # file that says which part of a model's weights is in which file
    SAFE_WEIGHTS_NAME,  # file of a model's weights
    WEIGHTS_INDEX_NAME,  # the same for weights in PyTorch's own format
    WEIGHTS_NAME,  # and of those weights
)
from transformers.utils.generic import is_flash_attention_requested  # which takes no mask of four dimensions

SAMPLE, BEAM_SEARCH = "_sample", "_beam_search"  # the decoding loops that feed one token at a time

__all__ = [
    "BEAM_SEARCH",
    "PREFIX_CHECKPOINT_DIR",
    "SAFE_WEIGHTS_INDEX_NAME",
    "SAFE_WEIGHTS_NAME",
    "SAMPLE",
    "WEIGHTS_INDEX_NAME",
    "WEIGHTS_NAME",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "attention_of",
    "commit_of",
    "decoder_classes",
    "fsdp_version_of",
    "is_flash_attention_requested",
    "layer_types",
    "layer_types_and_sizes",
    "set_zero3_state",
    "template_variables",
    "tied_weights",
    "tracker_callbacks",
    "unquantised",
    "without_checkpointing",
    "wrap_decoding_loops",
    "zero_stage_of",
]


# ---- models ------------------------------------------------------------------------------------------------------


def attention_of(config: PreTrainedConfig | None) -> str | None:
    """Name of the attention implementation in use, which can be set in public and only be read here."""
    return getattr(config, "_attn_implementation", None)


def commit_of(config: PreTrainedConfig) -> str | None:
    """The hub's commit that a configuration was loaded from, whatever `revision` named it; None for a folder's."""
    return getattr(config, "_commit_hash", None)


def layer_types(config: PreTrainedConfig) -> list[str]:
    """ "full_attention", "sliding_attention", ... of every layer, as a cache of transformers is built from them."""
    return layer_types_and_sizes(config)[0]


def layer_types_and_sizes(config: PreTrainedConfig) -> tuple[list[str], dict]:
    """The same, and the arguments of their cache layers: `sliding_window`, `number_of_states`.

    Layers that use the keys and values of an earlier one have no entry.
    """
    return get_layer_types_and_kwargs(config.get_text_config(decoder=True))


def decoder_classes(model: type[PreTrainedModel]) -> tuple[type, type, type, type]:
    """Decoder layer, attention, MLP and norm of a causal language model's family: only the whole models are public."""
    module, family = sys.modules[model.__module__], model.__name__.removesuffix("ForCausalLM")
    layer, attention, mlp, norm = (
        getattr(module, family + part) for part in ("DecoderLayer", "Attention", "MLP", "RMSNorm")
    )
    return layer, attention, mlp, norm


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Name -> name of the tensor that it shares, of which a checkpoint holds one."""
    return dict(model.all_tied_weights_keys)


def unquantised(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a model whose quantised weights were made whole: transformers would refuse to save it."""
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    return config


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[list[GradientCheckpointingLayer]]:
    """Gradient checkpointing off, since it drops the cache; yields the layers that had it, in order.

    The public switch would forget how it was configured.
    """
    on = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in on:
        module.gradient_checkpointing = False
    try:
        yield [module for module in on if isinstance(module, GradientCheckpointingLayer)]
    finally:
        for module in on:
            module.gradient_checkpointing = True


# ---- generate and chat templates ---------------------------------------------------------------------------------


def wrap_decoding_loops(wrap: Callable[[str, Callable], Callable]) -> None:
    """Replaces every decoding loop that `generate` can choose by `wrap(name, loop)`.

    The loops are private, but `generate` calls nothing public between the arguments it has made sense of and the first
    forward. A loop takes `self`, `input_ids`, `generation_config`, perhaps `synced_gpus`, and last the model's own
    inputs as keyword arguments, among them `past_key_values`.
    """
    names = {loop for loop in GENERATION_MODES_MAPPING.values() if "/" not in loop}  # others come from the hub
    for name in sorted(names | {"generate_batch"}):
        setattr(GenerationMixin, name, wrap(name, getattr(GenerationMixin, name)))


def template_variables(template: str) -> set[str]:
    """Names that a chat template looks at; transformers' own function knows its tags, which plain jinja2 does not."""
    from transformers.utils.chat_template_utils import _get_template_variables

    return set(_get_template_variables(template))


# ---- training ----------------------------------------------------------------------------------------------------


def tracker_callbacks() -> dict[str, type]:
    """Name in `report_to` -> class of its callback, which raises where the tracker is not installed."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return INTEGRATION_TO_CALLBACK


def zero_stage_of(args) -> int | None:
    """ZeRO's stage that the `deepspeed` key of a `TrainingArguments` asks for; None without the key."""
    return args.hf_deepspeed_config.get_value("zero_optimization.stage", 0) if args.deepspeed else None


def fsdp_version_of(args) -> int | None:
    """The version of FSDP that the `fsdp` key of a `TrainingArguments` asks for; None without the key."""
    return args.fsdp_plugin_args["fsdp_version"] if args.fsdp else None
