"""The segment-wise view: the decode fed in segments, with exact gradients and the activations of one segment only.

The prompt is the first segment; then come the runs of thought tokens that no eviction interrupts. Going forward, no
graph is kept: only the keys and values of every token, and what the encoder holds at every segment's start. Going
backward, the segments are run again, last first. What a segment leaves to the next is its outgoing cache (keys,
values, accumulator, queries), which is exactly what the next one took in, so the gradient that comes out of one
segment's incoming cache goes into the outgoing cache of the one before. Gradients of the weights add up on the way.

Memory: the activations of one segment, and keys and values of the whole text (on the CPU with `offload`). Where the
model has gradient checkpointing, they are every layer's input and one layer's inside.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pte_trl.cache.bounded import BoundedCache
from pte_trl.cache.schedule import Schedule
from pte_trl.compat.transformers import without_checkpointing

HELD = ("keys", "values", "accumulator", "queries")  # tensors of a cache layer that gradients flow through


class Lockstep(Protocol):
    """What an engine that divides the weights among ranks asks for (`pte_trl.runtime.lockstep`)."""

    def most(self, count: int) -> int:
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
        segment_length: split segments of thoughts that are longer; None: as long as evictions allow (W first, then
            E). The prompt is always one.
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
    runs = []
    # In a fixed order, so that sums of gradients are rounded alike whenever a run is repeated.
    for schedule in sorted(set(schedules), key=lambda schedule: schedule.window):
        rows = torch.tensor([row for row, each in enumerate(schedules) if each == schedule], device=input_ids.device)
        sample = (input_ids[rows], attention_mask[rows], prompt)
        runs.append(SegmentRun(model, *sample, schedule, segment_length, offload, temperature, rows))
    if lockstep is None:
        return _Segments.apply(Batch(runs), *(p for p in model.parameters() if p.requires_grad))
    count = sum(len(run.spans) for run in runs)
    # One token each, a prompt without a completion. Nothing of it reaches the loss.
    token = input_ids[:1, prompt - 1 : prompt + 1]
    idle = (token, torch.ones_like(token), 1, schedules[0], None, offload, temperature)
    runs += [SegmentRun(model, *idle) for _ in range(lockstep.most(count) - count)]
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

    def __init__(self, runs: list["SegmentRun"], lockstep: Lockstep | None = None):
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


class SegmentRun:
    """One pass over samples of one schedule, and what it takes to run any of its segments again.

    Args:
        rows: of the batch, that these samples are; None for a run that stands in for one of another rank.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor,
        prompt: int,
        schedule: Schedule,
        longest: int | None,
        offload: bool,
        temperature: float | None,
        rows: Tensor | None = None,
    ):
        self.model, self.ids, self.prompt, self.schedule, self.rows = model, ids, prompt, schedule, rows
        self.mask, self.prompt_mask = mask, mask[:, :prompt]
        self.positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.temperature = temperature
        self.store_on = torch.device("cpu") if offload else ids.device
        thoughts = schedule.chunks(ids.shape[1] - prompt - 1)  # the last token is sampled, never fed
        longest = longest or ids.shape[1]
        self.spans = [range(-prompt, 0)]
        self.spans += [
            range(i, min(run.stop, i + longest)) for run in thoughts for i in range(run.start, run.stop, longest)
        ]
        self.stored: list[tuple[Tensor, Tensor]] = []  # of every layer, keys and values of all tokens
        self.entered: list[list[dict]] = []  # of every segment and layer, the encoder's side of the cache
        device = ids.device.type
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    @torch.no_grad()
    def forward(self) -> tuple[Tensor, Tensor]:
        cache, logps, entropies = self._empty(), [], []
        with without_checkpointing(self.model):
            for span in self.spans:
                self.entered.append(
                    [{"accumulator": x.accumulator, "queries": x.queries, "owner": x.owner} for x in cache.layers]
                )
                some_logps, some_entropies = self._run(span, cache)
                logps.append(some_logps)
                entropies.append(some_entropies)
                self._keep(span, cache)
        return torch.cat(logps, 1)[:, self.prompt - 1 :], torch.cat(entropies, 1)[:, self.prompt - 1 :]

    def backward(self, given: Sequence[Tensor | None], pull: Callable) -> None:
        """Backward of all segments, last first.

        Args:
            given: gradients of log-probs and entropies, (batch, completion) each.
            pull: (outputs, their gradients, leaves) -> gradients of the leaves; keeps those of the weights.
        """
        # Gradients for the cache that this segment leaves to the next, by layer and name. The last one leaves it to
        # nobody, so there are none yet.
        outgoing: dict[tuple[int, str], Tensor | None] = {}
        with without_checkpointing(self.model) as checkpointed, torch.enable_grad():
            for index in reversed(range(len(self.spans))):
                span = self.spans[index]
                cache, taken = self._enter(index)  # cut off: gradients stop at `taken`
                with run_again_in_backward(checkpointed):
                    results = self._run(span, cache)
                tokens = slice(max(0, span.start + 1), span.stop + 1)  # those that this segment predicts
                outputs, grads = [], []
                for result, grad in zip(results, given, strict=True):
                    if grad is not None:  # of the prompt's results, only the last predicts a completion token
                        outputs.append(result[:, -grad[:, tokens].shape[1] :])
                        grads.append(grad[:, tokens])
                for place, tensor in _held(cache).items():
                    gradient = outgoing.get(place)
                    if gradient is not None and tensor.requires_grad:
                        outputs.append(tensor)
                        grads.append(gradient)
                # What came into this segment is what the one before it has left.
                outgoing = dict(zip(taken, pull(outputs, grads, list(taken.values())), strict=True))

    def _empty(self) -> BoundedCache:
        return BoundedCache.from_schedule(self.schedule)

    def _run(self, span: range, cache: BoundedCache) -> tuple[Tensor, Tensor]:
        """One segment through the model: log-probs of the tokens that follow each of its own, and entropies."""
        places = slice(self.prompt + span.start, self.prompt + span.stop)
        after = slice(places.start + 1, places.stop + 1)
        # Padded places get 0, as in one pass: their true log-probs could be so low that a KL term overflows.
        labels = self.ids[:, after].masked_fill(self.mask[:, after] == 0, -100)
        mask = self.prompt_mask
        if span.start < 0:
            labels[:, :-1] = -100
        else:
            held = self.schedule.first_visible(span.start)
            mask = torch.cat([mask, mask.new_ones(len(mask), span.stop - held)], dim=1)
        inputs = {"input_ids": self.ids[:, places], "attention_mask": mask, "position_ids": self.positions[:, places]}
        device, dtype, on = self.autocast
        with torch.autocast(device, dtype=dtype, enabled=on):
            if self.temperature is None:
                out = self.model(**inputs, past_key_values=cache, shift_labels=labels, fused_lm_head=True)
                return out.log_probs, out.entropy
            logits = self.model(**inputs, past_key_values=cache, use_cache=True).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logps = (logits / self.temperature).log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2) * (labels != -100), entropy

    def _keep(self, span: range, cache: BoundedCache) -> None:
        """Stores the keys and values that the segment has added."""
        if not self.stored:
            for layer in cache.layers:
                shape = (*layer.keys.shape[:2], self.ids.shape[1] - 1, layer.keys.shape[3])
                self.stored.append(
                    tuple(torch.empty(shape, dtype=x.dtype, device=self.store_on) for x in (layer.keys, layer.values))
                )
        places = slice(self.prompt + span.start, self.prompt + span.stop)
        for layer, (keys, values) in zip(cache.layers, self.stored, strict=True):
            keys[:, :, places] = layer.keys[:, :, -len(span) :].to(self.store_on)
            values[:, :, places] = layer.values[:, :, -len(span) :].to(self.store_on)

    def _enter(self, index: int) -> tuple[BoundedCache, dict[tuple[int, str], Tensor]]:
        """The cache as segment `index` found it, its tensors being leaves, and these by layer and name."""
        cache, taken, span = self._empty(), {}, self.spans[index]
        if span.start < 0:
            return cache, taken
        fed = span.start
        oldest = self.schedule.first_visible(fed - 1) if fed else 0  # what the token before left there
        for at, ((keys, values), encoder) in enumerate(zip(self.stored, self.entered[index], strict=True)):
            layer, device = cache.layer(at), self.ids.device
            layer.lazy_initialization(keys, values)
            layer.device = device
            layer.prompt, layer.fed, layer.owner = self.prompt, fed, encoder["owner"]
            layer.evicted = self.schedule.evictions(fed)
            kept = (
                torch.cat([x[:, :, : self.prompt], x[:, :, self.prompt + oldest : self.prompt + fed]], 2)
                for x in (keys, values)
            )
            held = dict(
                zip(HELD, (*(x.to(device) for x in kept), encoder["accumulator"], encoder["queries"]), strict=True)
            )
            for name, tensor in held.items():
                if tensor is not None:
                    taken[at, name] = tensor.detach().requires_grad_()
                    setattr(layer, name, taken[at, name])
        return cache, taken


def _held(cache: BoundedCache) -> dict[tuple[int, str], Tensor | None]:
    """The tensors that gradients flow through, by layer and name."""
    return {(at, name): getattr(layer, name) for at, layer in enumerate(cache.layers) for name in HELD}


@contextmanager
def run_again_in_backward(layers: list[nn.Module]):
    """Decoder layers, in order, that keep what enters them and run again in backward: checkpointing with a cache."""
    for index, layer in enumerate(layers):
        layer.forward = partial(_checkpointed, layer.forward, index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def _checkpointed(forward, index: int, hidden: Tensor, *args, past_key_values: BoundedCache, **kwargs):
    # The second run must find what the first one found. And what is kept for it must not be the cache itself, whose
    # tensors will hold on to what is kept for their backward: only the garbage collector would free that circle.
    before, found = past_key_values.layer(index), copy.copy(past_key_values)
    found.layers = list(past_key_values.layers)

    def run(hidden: Tensor, *held: Tensor | None):
        layer, cache = copy.copy(before), copy.copy(found)
        for name, tensor in zip(HELD, held, strict=True):
            setattr(layer, name, tensor)
        cache.layers = [*found.layers[:index], layer, *found.layers[index + 1 :]]
        return forward(hidden, *args, past_key_values=cache, **kwargs), layer

    held = (getattr(before, name) for name in HELD)
    out, after = checkpoint(run, hidden, *held, use_reentrant=False, preserve_rng_state=False)
    past_key_values.layers[index] = after
    return out
