"""The attention implementation that a model is right under, where a recipe's own is not."""

import torch

from pte_trl.compat.transformers import supports_sdpa
from pte_trl.models.template import say


def eager_alone(config) -> str | None:
    """Why only `eager` computes the attention of this model; None where others do.

    PyTorch's SDPA, and `blockwise` with it, has no cap for the logits and no attention sinks. transformers leaves the
    cap out there without a word, and has no SDPA for models with sinks.

    Args:
        config: of a model with attention; a multimodal one counts by its language model.
    """
    cap = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    if cap:
        return f"SDPA would leave out attn_logit_softcapping={cap:g}"
    return None if supports_sdpa(config) else f"transformers has no SDPA for {config.model_type}"


def usable_attention(asked: str, config, quiet: bool = False) -> str:
    """`asked`, or "eager" where only that computes what the model was trained with.

    Args:
        quiet: do not print the change.
    """
    if asked == "eager" or (why := eager_alone(config)) is None:
        return asked
    if not quiet:
        say(f"attn_implementation: eager instead of {asked}, since {why}")
    return "eager"


def allow_cudnn(allowed: bool) -> None:
    """Whether PyTorch may choose cuDNN's attention in this process.

    It makes a plan for every shape that it meets for the first time, and the shapes of rollouts keep changing.
    """
    torch.backends.cuda.enable_cudnn_sdp(allowed)
