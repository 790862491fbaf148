"""Teacher and student in one model: the same weights, the adapter off with the full cache, or on under the window."""

from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor

from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs


def hidden_states(
    model: PeftModel, ids: Tensor, mask: Tensor, prompt: int, windows: Tensor | int, evict_ratio: float
) -> tuple[Tensor, Tensor]:
    """What the LM head reads for each completion token, of student and teacher.

    Args:
        ids, mask: (batch, prompt + completion), prompts padded on the left, completions on the right.
        prompt: padded length of the prompts.
        windows: W of every sample, or one for all.

    Returns:
        Two of shape (batch, completion, hidden), at the positions that predict the completion's tokens. The
        teacher's has no gradient.
    """
    inputs = replay_inputs(model, mask, prompt, windows, evict_ratio)
    decoder = model.get_base_model().base_model
    # The teacher first: switching the adapter off and on again touches requires_grad, which no graph should see.
    with torch.no_grad(), model.disable_adapter():
        plain = {"attention_mask": mask, "position_ids": inputs["position_ids"], "use_cache": False}
        teacher = decoder(input_ids=ids, **plain).last_hidden_state[:, prompt - 1 : -1]
    student = decoder(input_ids=ids, **inputs).last_hidden_state[:, prompt - 1 : -1]
    return student, teacher


def evictions_seen(length: int, windows: Tensor, evict_ratio: float) -> Tensor:
    """(batch, length): evictions that have happened when token t is predicted, that is, when thought t - 1 is fed."""
    return _of_fed(length, windows, evict_ratio, lambda schedule, fed: schedule.evictions_before(fed))


def tokens_since_eviction(length: int, windows: Tensor, evict_ratio: float) -> Tensor:
    """(batch, length): tokens fed since the last eviction when token t is predicted, from 0; -1 before the first."""

    def since(schedule: Schedule, fed: Tensor) -> Tensor:
        first = schedule.window + (schedule.evictions_before(fed) - 1) * schedule.evict
        return torch.where(fed < schedule.window, -1, fed - first)

    return _of_fed(length, windows, evict_ratio, since)


def _of_fed(length: int, windows: Tensor, evict_ratio: float, ask: Callable[[Schedule, Tensor], Tensor]) -> Tensor:
    fed = torch.arange(length) - 1
    rows = [ask(Schedule(window, evict_ratio), fed) for window in windows.tolist()]
    return torch.stack(rows).to(windows.device)
