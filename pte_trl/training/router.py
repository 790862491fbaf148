"""The load-balancing loss of a mixture of experts under a bounded cache: TRL's, on the replay's router logits.

TRL computes it from the router logits of all layers and from the attention mask that the model is called with, which
must say which tokens are real. The mask of a replay says what every token sees. So the head around the language model
gets the first, and the language model the second.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def loss_weight(args, config) -> float:
    """Of the load-balancing loss, as TRL's GRPO reads it: the recipe's, else the model's own; 0.0 without a router."""
    text = config.get_text_config()
    if not hasattr(text, "output_router_logits"):
        return 0.0
    stated = args.router_aux_loss_coef
    return getattr(text, "router_aux_loss_coef", 0.0) if stated is None else stated


def check_whole(args, config) -> None:
    """Refuses segments where the loss needs the router's choices for all tokens at once.

    Raises:
        ValueError: naming the weight and what is allowed.
    """
    if weight := loss_weight(args, config):
        raise ValueError(
            f"replay='segments': the load-balancing loss (router_aux_loss_coef={weight:g}) is of all tokens of a "
            "micro-batch, and a segment sees some; allowed are router_aux_loss_coef=0.0, or replay=one_pass"
        )


@contextmanager
def seeing(model: PreTrainedModel, mask: Any) -> Iterator[None]:
    """Inside it the language model below the head is called with `mask`, whatever attention mask the head was given.

    Args:
        model: the causal language model, without wrappers.
    """

    def exchange(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"attention_mask": mask}

    handle = model.base_model.register_forward_pre_hook(exchange, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
