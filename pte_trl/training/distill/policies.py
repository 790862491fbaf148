"""Teacher and student in one model: the same weights, the adapter off with the full cache, or on under the window."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor

from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs


def hidden_states(
    model: PeftModel, ids: Tensor, mask: Tensor, prompt: int, schedules: Schedule | Sequence[Schedule]
) -> tuple[Tensor, Tensor]:
    """What the LM head reads for each completion token, of student and teacher.

    Args:
        ids, mask: (batch, prompt + completion), prompts padded on the left, completions on the right.
        prompt: padded length of the prompts.
        schedules: of the student's samples, or one for all.

    Returns:
        Two of shape (batch, completion, hidden), at the positions that predict the completion's tokens. The
        teacher's has no gradient.
    """
    inputs = replay_inputs(model, mask, prompt, schedules)
    decoder = model.get_base_model().base_model
    # The teacher first: switching the adapter off and on again touches requires_grad, which no graph should see.
    with torch.no_grad(), model.disable_adapter():
        plain = {"attention_mask": mask, "position_ids": inputs["position_ids"], "use_cache": False}
        teacher = decoder(input_ids=ids, **plain).last_hidden_state[:, prompt - 1 : -1]
    student = decoder(input_ids=ids, **inputs).last_hidden_state[:, prompt - 1 : -1]
    return student, teacher


def evictions_seen(length: int, schedules: Sequence[Schedule]) -> Tensor:
    """(batch, length): evictions that have happened when token t is predicted, that is, when thought t - 1 is fed."""
    fed = torch.arange(length) - 1
    return torch.stack([schedule.evictions_before(fed) for schedule in schedules])


def tokens_since_eviction(length: int, schedule: Schedule) -> Tensor:
    """(length,): tokens fed since the last eviction when token t is predicted, from 0; -1 before the first."""
    fed = torch.arange(length) - 1
    first = schedule.window + (schedule.evictions_before(fed) - 1) * schedule.evict
    return torch.where(fed < schedule.window, -1, fed - first)
