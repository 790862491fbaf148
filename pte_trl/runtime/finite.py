"""Numbers that are not finite end a run with a sentence that names the step, the rank and the sample."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pte_trl.rewards.functions import completion_text
from pte_trl.runtime.faults import Fault


def check_finite(what: str, values: Tensor, place: str, name: Callable[[int], str]) -> None:
    """Stops at the first sample with a NaN or an infinity among its (samples, ...) values.

    Args:
        place: step and rank.
        name: of the sample with an index, for a human being.
    """
    bad = ~torch.isfinite(values.detach()).flatten(1).all(dim=1)
    if bad.any():
        index = int(bad.nonzero()[0])
        first = values[index][~torch.isfinite(values[index])][0].item()
        raise Fault(
            f"{place}: {what} are not finite ({first}) in {int(bad.sum())} of {len(bad)} samples, "
            f"first in {name(index)}"
        )


class FiniteReward:
    """A reward function that stops the run at NaN or infinity; None, by which TRL leaves a sample out, passes."""

    def __init__(self, function: Callable, rank: int):
        self.function, self.rank = function, rank
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, prompts: list, completions: list, trainer_state=None, **kwargs) -> list:
        rewards = self.function(prompts=prompts, completions=completions, trainer_state=trainer_state, **kwargs)
        for index, reward in enumerate(rewards):
            if reward is not None and not abs(float(reward)) < float("inf"):
                step = trainer_state.global_step + 1 if trainer_state else "?"
                raise Fault(
                    f"step {step}, rank {self.rank}: {self.__name__} gave {reward} for sample {index} of "
                    f"{len(rewards)}, prompt {tail(completion_text(prompts[index]))}, "
                    f"completion {tail(completion_text(completions[index]))}"
                )
        return rewards


def tail(text: str, length: int = 80) -> str:
    """The end of a text, where a prompt differs from others."""
    return repr(text if len(text) <= length else "…" + text[-length:])


def samples_without_gradient(loss_of: Callable[[int], Tensor], count: int, parameters: Sequence[Tensor]) -> list[int]:
    """The samples, of `count`, whose own loss has a gradient that is not finite."""
    bad = []
    for index in range(count):
        grads = torch.autograd.grad(loss_of(index), parameters, allow_unused=True)
        if not all(torch.isfinite(grad).all() for grad in grads if grad is not None):
            bad.append(index)
    return bad
