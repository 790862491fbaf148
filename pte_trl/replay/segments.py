"""The segment-wise view: the decode fed in segments, with exact gradients and the activations of one segment only.

The prompt is the first segment; then come runs of 512 thought tokens or of W, each over several evictions
(`pte_trl.replay.segment_run`). Going forward, no graph is kept: only the keys and values of every token, and what the
encoder holds at every segment's start. Going backward, the segments are run again, last first. Later segments have
seen a segment's keys and values and what the encoder held (accumulator, queries): the gradients that they found for
these are what its own backward starts from, beside those of its log-probs. Gradients of the weights add up on the way.

Memory: the activations of one segment, the gradients of the keys and values that it sees, and keys and values of the
text up to there (on the CPU with `offload`). Where the model has gradient checkpointing, the activations are every
layer's input and one layer's inside.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from pte_trl.cache.schedule import Schedule
from pte_trl.replay.segment_run import SegmentRun
from pte_trl.transfer import uploaded


class Lockstep(Protocol):
    """What an engine that divides the weights among ranks asks for (`pte_trl.runtime.lockstep`)."""

    def most(self, count: int, device: torch.device) -> int:
        """The largest `count` of all ranks, each of which calls this."""

    def backward(self) -> AbstractContextManager:
        """A context around the backward passes of all segments, after which gradients have been reduced."""

    def release(self) -> None:
        """Lets go of the weights that the backward of one segment has left gathered."""


def segment_logps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    prompt: int,
    schedules: Schedule | Sequence[Schedule],
    *,
    segment_length: int | None = None,
    offload: bool = False,
    temperature: float | None = None,
    lockstep: Lockstep | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the completion tokens under the bounded cache, and the entropies they were drawn at.

    Both carry gradients, as in one pass.

    Args:
        model: bare, with LoRA or with PTE; without dropout.
        input_ids, attention_mask: (batch, prompt + completion), prompts padded left, completions right.
        prompt: padded length of the prompts.
        schedules: that each sample was decoded under, or one for all; samples of one schedule go together.
        segment_length: thought tokens of one segment at most; None: W, or 512 if that is more. Where PTE adapts k_proj
            or v_proj, W is the most there can be. The prompt is always one segment.
        offload: keep keys and values of past segments on the CPU.
        temperature: None for TRL's fused LM head, which has its own and works in float32; a number computes the
            logits whole, in float32 at least, for models without that head.
        lockstep: of an engine that gathers weights in every forward and backward; every rank then runs as many
            segments as the rank that has the most.

    Returns:
        (batch, completion) each. Log-probs of padded places are 0.
    """
    if isinstance(schedules, Schedule):
        schedules = [schedules] * len(input_ids)
    runs, small = [], None if lockstep is None else 0
    # In a fixed order, so that sums of gradients are rounded alike whenever a run is repeated.
    for schedule in sorted(set(schedules), key=lambda schedule: (schedule.window, schedule.evict)):
        rows = uploaded([row for row, each in enumerate(schedules) if each == schedule], input_ids.device)
        sample = (input_ids[rows], attention_mask[rows], prompt)
        runs.append(SegmentRun(model, *sample, schedule, segment_length, offload, temperature, rows, small))
    if lockstep is None:
        return _Segments.apply(Batch(runs), *(p for p in model.parameters() if p.requires_grad))
    count = sum(len(run.spans) for run in runs)
    # One token each, a prompt without a completion. Nothing of it reaches the loss.
    token = input_ids[:1, prompt - 1 : prompt + 1]
    idle = (token, torch.ones_like(token), 1, schedules[0], None, offload, temperature)
    runs += [SegmentRun(model, *idle, small=small) for _ in range(lockstep.most(count, input_ids.device) - count)]
    # The engine collects the gradients of the weights itself; autograd only has to know that there are some.
    return _Segments.apply(Batch(runs, lockstep), torch.ones((), device=input_ids.device, requires_grad=True))


class _Segments(torch.autograd.Function):
    """One node in the graph: weights in, log-probs out."""

    @staticmethod
    def forward(ctx, batch: "Batch", *parameters: Tensor):
        ctx.batch, ctx.parameters = batch, parameters
        ctx.set_materialize_grads(False)  # no gradient of the entropies where the loss has none of them
        return batch.forward()

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        if ctx.batch.lockstep is not None:
            ctx.batch.backward_in_lockstep(grads)
            return None, None
        needed = [p for p, wanted in zip(ctx.parameters, ctx.needs_input_grad[1:], strict=True) if wanted]
        found = dict(zip(map(id, needed), ctx.batch.backward(grads, needed), strict=True))
        return None, *(found.get(id(p)) for p in ctx.parameters)


class Batch:
    """The runs of all samples, one after another."""

    def __init__(self, runs: list[SegmentRun], lockstep: Lockstep | None = None):
        self.runs, self.lockstep = runs, lockstep

    def forward(self) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, (batch, completion) each."""
        found = [run.forward() for run in self.runs]
        with_rows = [(run.rows, both) for run, both in zip(self.runs, found, strict=True) if run.rows is not None]
        rows = torch.cat([rows for rows, _ in with_rows]).argsort()
        return tuple(torch.cat(parts)[rows] for parts in zip(*(both for _, both in with_rows), strict=True))

    def backward(self, given: tuple[Tensor | None, Tensor | None], parameters: list[Tensor]) -> list[Tensor]:
        """Gradients of the parameters for those of log-probs and entropies, (batch, completion) each."""
        totals = [torch.zeros_like(p) for p in parameters]

        def pull(outputs: list[Tensor], grads: list[Tensor], leaves: list[Tensor]) -> Sequence[Tensor | None]:
            # Not `backward`: what DDP and ZeRO hang on a weight's gradient must run once, with the whole of it.
            found = torch.autograd.grad(outputs, [*parameters, *leaves], grads, allow_unused=True)
            for total, more in zip(totals, found, strict=False):
                if more is not None:
                    total += more
            return found[len(totals) :]

        self._all_backward(given, pull)
        return totals

    def backward_in_lockstep(self, given: tuple[Tensor | None, Tensor | None]) -> None:
        """The same, the engine's own hooks taking the gradients of the weights."""

        def pull(outputs: list[Tensor], grads: list[Tensor], leaves: list[Tensor]) -> Sequence[Tensor | None]:
            torch.autograd.backward(outputs, grads)
            self.lockstep.release()
            return [leaf.grad for leaf in leaves]

        with self.lockstep.backward():
            self._all_backward(given, pull)

    def _all_backward(self, given: tuple[Tensor | None, Tensor | None], pull: Callable) -> None:
        for run in reversed(self.runs):
            if run.rows is None:  # zeros, that it adds nothing
                run.backward([None if grad is None else grad.new_zeros(1, 1) for grad in given], pull)
            else:
                run.backward([None if grad is None else grad[run.rows] for grad in given], pull)
