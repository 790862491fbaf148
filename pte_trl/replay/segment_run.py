"""One run of the segment-wise view: samples of one schedule, forward segment by segment and backward, last first.

The prompt is the first segment. A segment of thoughts may run over several evictions, and a mask hides from every
token what has left before it. So a segment is a replay of its own in one pass, which starts from a cache: the states
after all of its evictions are found at once, from keys and values that lie in the cache and, where the segment is
longer than what the window keeps, from those of its own tokens. Where keys and values depend on the state themselves,
a segment ends before an eviction would take a token of it.

A sliding layer is fed alike, under a mask of its own. A recurrent layer starts from the state that the segment before
has left, and hands the gradient of that state back to it.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pte_trl.cache.bounded import BoundedCache
from pte_trl.cache.bounded_layer import Rows
from pte_trl.cache.layers import KINDS, RecurrentLayer, copied, hold, layers_of
from pte_trl.cache.masks import check_mask_taken, config_of
from pte_trl.cache.pieces import takes_up_states
from pte_trl.cache.schedule import Schedule
from pte_trl.compat.transformers import layer_types_and_sizes, without_checkpointing
from pte_trl.replay.segment_layers import SEGMENT_KINDS, Entered, Fed, Past, fetching, handed_on, in_use
from pte_trl.replay.segment_masks import segment_masks

# Up to so many tokens, over all of its samples, a segment's layers do not run again inside its backward, although the
# model has gradient checkpointing. What they then hold is less than the cache of a long text, and one forward of four
# is spared.
SMALL = 64
# Thought tokens of a segment at most, unless W is larger or the recipe says otherwise. Shorter ones cost launches: a
# segment has about as many of them whatever its length is. Longer ones cost memory: activations grow with the length,
# and a segment's mask and its attention on a CPU with the square of it.
LONGEST = 512


def spans_of(
    schedule: Schedule, prompt: int, thoughts: int, longest: int | None = None, evicts_own: bool = True
) -> list[range]:
    """The segments of a text: the prompt, range(-prompt, 0), then ranges of thought tokens.

    Args:
        thoughts: tokens that are fed; the last one of a completion is sampled and never fed.
        longest: thought tokens of one segment at most; None: W, or `LONGEST` if that is more.
        evicts_own: whether an eviction within a segment may take a token of the segment.
    """
    longest, spans, at = longest or max(schedule.window, LONGEST), [range(-prompt, 0)], 0
    while at < thoughts:
        stop = min(at + longest, thoughts)
        if not evicts_own:  # the last state under which the segment's first token is still there
            stop = min(stop, schedule.decoded_under(at // schedule.evict).stop)
        spans.append(range(at, stop))
        at = stop
    return spans


def keys_follow_state(model: nn.Module) -> bool:
    """Whether keys or values of a token depend on a state S, which depends on those of earlier tokens."""
    return any(getattr(module, "keys_follow_state", False) for module in model.modules())


def check_states_taken_up(model: nn.Module) -> None:
    """Refuses a model whose code forgets what came before a segment.

    Raises:
        ValueError: its recurrent layers begin every forward of several tokens from an empty state.
    """
    kinds, _ = layer_types_and_sizes(config_of(model))
    recurrent = any(issubclass(KINDS.get(kind, Rows), RecurrentLayer) for kind in kinds)
    if recurrent and not takes_up_states(model):
        raise ValueError(
            f"replay='segments': recurrent layers of model_type={config_of(model).model_type!r} begin every forward "
            "of several tokens from an empty state, and would forget what came before a segment; allowed is 'one_pass'"
        )


class SegmentRun:
    """One pass over samples of one schedule, and what it takes to run any of its segments again.

    Args:
        rows: of the batch, that these samples are; None for a run that only matches one of another rank.
        small: as `SMALL`. 0 where ranks gather weights in lockstep, since each layer must then run equally often on
            every rank.
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
        small: int | None = None,
    ):
        self.model, self.ids, self.prompt, self.schedule, self.rows = model, ids, prompt, schedule, rows
        self.mask = mask
        self.positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.temperature = temperature
        self.small = SMALL if small is None else small
        check_mask_taken(model)
        self.spans = spans_of(schedule, prompt, ids.shape[1] - prompt - 1, longest, not keys_follow_state(model))
        self.store_on = torch.device("cpu") if offload else ids.device
        self.past = Past(self.spans, self.store_on)
        self.entered: list[Entered] = []  # by segment
        device = ids.device.type
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    @torch.no_grad()
    def forward(self) -> tuple[Tensor, Tensor]:
        layers = layers_of(config_of(self.model), self.schedule, SEGMENT_KINDS)
        cache, logps, entropies = self._cache(layers), [], []
        with without_checkpointing(self.model):
            for span in self.spans:
                self.entered.append(Entered(cache.layers, self.store_on))
                some_logps, some_entropies = self._run(span, cache)
                logps.append(some_logps)
                entropies.append(some_entropies)
                self.past.keep(cache.layers)
        return torch.cat(logps, 1)[:, self.prompt - 1 :], torch.cat(entropies, 1)[:, self.prompt - 1 :]

    def backward(self, given: Sequence[Tensor | None], pull: Callable) -> None:
        """Backward of all segments, last first.

        Args:
            given: gradients of log-probs and entropies, (batch, completion) each.
            pull: (outputs, their gradients, leaves) -> gradients of the leaves; keeps those of the weights.
        """
        if None in self.past.kept:
            raise RuntimeError("backward through segments a second time: after the first they hold nothing any more")
        # A value in the graph of everything that comes from the past: autograd only goes where gradients are wanted.
        anchor = torch.zeros((), device=self.ids.device, requires_grad=True)
        # Gradients for what this segment hands on to the next, by layer and name. The last one hands nothing on, so
        # there are none yet.
        outgoing: dict[tuple[int, str], Tensor | None] = {}
        with without_checkpointing(self.model) as checkpointed, torch.enable_grad():
            for index in reversed(range(len(self.spans))):
                span = self.spans[index]
                cache, taken = self._enter(index, anchor)
                again = checkpointed if len(self.ids) * len(span) > self.small else []
                with run_again_in_backward(again):
                    results = self._run(span, cache)
                tokens = slice(max(0, span.start + 1), span.stop + 1)  # those that this segment predicts
                pairs = [  # of the prompt's results, only the last predicts a completion token
                    (result[:, -grad[:, tokens].shape[1] :], grad[:, tokens])
                    for result, grad in zip(results, given, strict=True)
                    if grad is not None
                ]
                pairs += self._left_behind(index, cache, outgoing)
                pulled = pull(*map(list, zip(*pairs, strict=True)), [anchor, *taken.values()])
                # What came into this segment is what the one before it has left.
                outgoing = dict(zip(taken, pulled[1:], strict=True))
                self.past.drop(index)
                self.entered[index] = None

    def _left_behind(self, index: int, cache: BoundedCache, outgoing: dict) -> list[tuple[Tensor, Tensor]]:
        """What a segment leaves to later ones, each with its gradient."""
        pairs = []
        for at, layer in enumerate(cache.layers):
            if isinstance(layer, Fed):
                pairs += zip(layer.new, self.past.gradients.get((index, at), (None, None)), strict=True)
            pairs += ((x, outgoing.get((at, name))) for name, x in handed_on(layer).items())
        return [(x, grad) for x, grad in pairs if grad is not None and x.requires_grad]

    def _run(self, span: range, cache: BoundedCache) -> tuple[Tensor, Tensor]:
        """One segment through the model: log-probs of the tokens that follow each of its own, and entropies."""
        places = slice(self.prompt + span.start, self.prompt + span.stop)
        after = slice(places.start + 1, places.stop + 1)
        # Padded places get 0, as in one pass: their true log-probs could be so low that a KL term overflows.
        labels = self.ids[:, after].masked_fill(self.mask[:, after] == 0, -100)
        if span.start < 0:
            labels[:, :-1] = -100
        inputs = {"input_ids": self.ids[:, places], "position_ids": self.positions[:, places]}
        inputs["attention_mask"] = segment_masks(self.model, self.mask, self.prompt, span, self.schedule)
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

    def _cache(self, layers: Sequence) -> BoundedCache:
        cache = BoundedCache.from_schedule(self.schedule)
        cache.layers, cache.layer_class_to_replicate = list(layers), None
        return cache

    def _enter(self, index: int, anchor: Tensor) -> tuple[BoundedCache, dict[tuple[int, str], Tensor]]:
        """The cache as segment `index` found it, and of it the leaves at which gradients stop, by layer and name."""
        layers, taken = self.entered[index].leaves(self.ids.device)
        if index:
            for at, layer in enumerate(layers):
                if isinstance(layer, Fed):
                    pieces = self.past.pieces(*layer.sees(self.spans[index].start))
                    layer.fetch = fetching(anchor, self.past, at, pieces)
        return self._cache(layers), taken


@contextmanager
def run_again_in_backward(layers: list[nn.Module]):
    """Decoder layers that keep what enters them and run again in backward: checkpointing with a cache."""
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward, cache_layers_of(layer))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def cache_layers_of(layer: nn.Module) -> list[int]:
    """Which layers of the cache a decoder layer uses."""
    found = {module.layer_idx for module in layer.modules() if isinstance(getattr(module, "layer_idx", None), int)}
    return sorted(found)


def _checkpointed(forward, indices: list[int], hidden: Tensor, *args, past_key_values: BoundedCache, **kwargs):
    # The second run must find what the first one found. And what is kept for it must not be the cache itself, whose
    # tensors will hold on to what is kept for their backward: only the garbage collector would free that circle.
    found = copy.copy(past_key_values)
    found.layers = list(past_key_values.layers)
    before = {index: found.layers[index] for index in indices if index < len(found.layers)}
    places = [(index, name) for index, layer in before.items() for name in handed_on(layer)]

    def run(hidden: Tensor, *tensors: Tensor):
        layers, cache = {index: copied(layer) for index, layer in before.items()}, copy.copy(found)
        cache.layers = [layers.get(index, layer) for index, layer in enumerate(found.layers)]
        for (index, name), x in zip(places, tensors, strict=True):
            hold(layers[index], in_use({name: x}))
        return forward(hidden, *args, past_key_values=cache, **kwargs), layers

    carried = (handed_on(before[index])[name] for index, name in places)
    out, after = checkpoint(run, hidden, *carried, use_reentrant=False, preserve_rng_state=False)
    for index, layer in after.items():
        past_key_values.layers[index] = layer
    return out
