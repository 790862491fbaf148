"""One run of the segment-wise view: samples of one schedule, forward segment by segment and backward, last first.

The prompt is the first segment. A segment of thoughts may run over several evictions, and a mask hides from every
token what has left before it. So a segment is a replay of its own in one pass, which starts from a cache: the states
after all of its evictions are found at once, from keys and values that lie in the cache and, where the segment is
longer than what the window keeps, from those of its own tokens. Where keys and values depend on the state themselves,
a segment ends before an eviction would take a token of it.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pte_trl.cache.bounded import BoundedCache, BoundedLayer
from pte_trl.cache.masks import check_mask_taken, mask_for
from pte_trl.cache.schedule import Schedule
from pte_trl.compat.transformers import without_checkpointing
from pte_trl.transfer import fetched, offloaded

# Up to so many tokens, over all of its samples, a segment's layers do not run again inside its backward, although the
# model has gradient checkpointing. What they then hold is less than the cache of a long text, and one forward of four
# is spared.
SMALL = 64
# Thought tokens of a segment at most, unless W is larger or the recipe says otherwise. Shorter ones cost launches: a
# segment has about as many of them whatever its length is. Longer ones cost memory: activations grow with the length,
# and a segment's mask and its attention on a CPU with the square of it.
LONGEST = 512
HELD = ("accumulator", "queries")  # tensors of a cache layer, beside keys and values, that gradients flow through


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


class Past:
    """Keys and values of a text, and gradients for them: a tensor for every segment and layer.

    A token's keys and values are the same in every segment that sees them. So their gradient has one place, into
    which each of these segments adds its own, and no segment hands on gradients of a whole cache.
    """

    def __init__(self, spans: list[range], store_on: torch.device):
        self.spans, self.store_on = spans, store_on
        self.kept: list[list[tuple[Tensor, Tensor]] | None] = []  # by segment and layer
        self.gradients: dict[tuple[int, int], list[Tensor | None]] = {}  # of segment and layer, where there are any

    def keep(self, cache: BoundedCache) -> None:
        """Stores the keys and values that the next segment has added."""
        self.kept.append([tuple(offloaded(x, self.store_on) for x in layer.new) for layer in cache.layers])
        for layer in cache.layers:
            layer.new = ()

    def pieces(self, oldest: int, stop: int) -> list[tuple[int, slice]]:
        """Where the prompt and the thought tokens from `oldest` to `stop` lie: segments, and tokens in them."""
        seen = [(0, slice(0, len(self.spans[0])))]
        for segment, span in enumerate(self.spans[1:], 1):
            part = slice(max(oldest, span.start) - span.start, min(stop, span.stop) - span.start)
            if part.start < part.stop:
                seen.append((segment, part))
        return seen

    def gather(self, layer: int, pieces: list[tuple[int, slice]], device: torch.device) -> tuple[Tensor, ...]:
        """Keys and values of the pieces, in a row."""
        length = sum(part.stop - part.start for _, part in pieces)
        found = []
        for which in range(2):
            like = self.kept[0][layer][which]
            row, at = like.new_empty(*like.shape[:2], length, like.shape[3], device=device), 0
            for segment, part in pieces:
                size = part.stop - part.start
                row[:, :, at : at + size] = fetched(self.kept[segment][layer][which], device)[:, :, part]
                at += size
            found.append(row)
        return tuple(found)

    def add(self, layer: int, pieces: list[tuple[int, slice]], grads: Sequence[Tensor | None]) -> None:
        """Adds to the gradients of the pieces."""
        for which, grad in enumerate(grads):
            at = 0
            for segment, part in pieces if grad is not None else ():
                held, size = self.gradients.setdefault((segment, layer), [None, None]), part.stop - part.start
                if held[which] is None:
                    held[which] = grad.new_zeros(self.kept[segment][layer][which].shape)
                held[which][:, :, part] += grad[:, :, at : at + size]
                at += size

    def drop(self, segment: int) -> None:
        """Forgets a segment whose backward is done: the ones before it have never seen it."""
        self.kept[segment] = None
        self.gradients = {place: held for place, held in self.gradients.items() if place[0] != segment}


class _Fetch(torch.autograd.Function):
    """Keys and values of the past, which go into the graph without one tensor of it being held for that."""

    @staticmethod
    def forward(ctx, anchor: Tensor, past: Past, layer: int, pieces: list[tuple[int, slice]]):
        ctx.add = partial(past.add, layer, pieces)
        ctx.set_materialize_grads(False)
        return past.gather(layer, pieces, anchor.device)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        ctx.add(grads)
        return None, None, None, None


class SegmentLayer(BoundedLayer):
    """A layer of the cache that is fed segments, each perhaps with several evictions.

    Going backward it is made for one segment: what it holds is fetched when the model reaches it, and released.

    Attributes:
        fetch: gives the keys and values before the segment; None for a prompt, and going forward.
        new: keys and values of the segment itself.
    """

    fetch: Callable[[], tuple[Tensor, Tensor]] | None = None
    new: tuple[Tensor, Tensor] = ()

    def make_room(self, length: int, encode: Callable[[Tensor, Tensor, int], None] | None = None) -> None:
        """Lets leave what has to before the last of `length` tokens, which may be some of these tokens.

        Args:
            length: tokens fed next.
            encode: called with the keys and values that leave, eviction by eviction in a row, and with the number of
                evictions. Those of the tokens fed next are not here yet, so they are missing at the end.

        Only what leaves before the first token is dropped: the first tokens still see the rest.
        """
        if self.fetch is not None:
            self.keys, self.values = self.fetch()
            self.fetch = None
        if self.in_prompt():
            return
        due = self.schedule.evictions_before(self.fed + length - 1) - self.evicted
        if due == 0:
            return
        leaving = slice(self.prompt, self.prompt + due * self.schedule.evict)
        if encode is not None:
            encode(self.keys[:, :, leaving], self.values[:, :, leaving], due)
        self._drop(self.schedule.evictions_before(self.fed) - self.evicted)
        self.evicted += due

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        length, prompt = key_states.shape[2], self.in_prompt()
        self.make_room(length)
        self.new = (key_states, value_states)
        if prompt:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values, self.prompt = key_states, value_states, length
        else:
            self.keys = torch.cat([self.keys, key_states], dim=2)
            self.values = torch.cat([self.values, value_states], dim=2)
        found = self.keys, self.values
        if torch.is_grad_enabled():
            self.keys = self.values = None
        elif not prompt:
            self._drop(self.evicted - self.schedule.evictions_before(self.fed))
        self.fed += 0 if prompt else length
        return found

    def _drop(self, evictions: int) -> None:
        """Forgets the oldest thought tokens, as many as so many evictions take."""
        if evictions:
            stop = self.prompt + evictions * self.schedule.evict
            self.keys, self.values = (self._without(x, self.prompt, stop) for x in (self.keys, self.values))


class SegmentRun:
    """One pass over samples of one schedule, and what it takes to run any of its segments again.

    Args:
        rows: of the batch, that these samples are; None for a run that stands in for one of another rank.
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
        self.past = Past(self.spans, torch.device("cpu") if offload else ids.device)
        self.entered: list[list[dict]] = []  # of every segment and layer, the encoder's side of the cache
        device = ids.device.type
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    @torch.no_grad()
    def forward(self) -> tuple[Tensor, Tensor]:
        cache, logps, entropies = self._cache(), [], []
        with without_checkpointing(self.model):
            for span in self.spans:
                self.entered.append(
                    [{"accumulator": x.accumulator, "queries": x.queries, "owner": x.owner} for x in cache.layers]
                )
                some_logps, some_entropies = self._run(span, cache)
                logps.append(some_logps)
                entropies.append(some_entropies)
                self.past.keep(cache)
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
        # Gradients for the encoder's side of the cache that this segment leaves to the next, by layer and name. The
        # last one leaves it to nobody, so there are none yet.
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

    def _left_behind(self, index: int, cache: BoundedCache, outgoing: dict) -> list[tuple[Tensor, Tensor]]:
        """What a segment leaves to later ones, each with its gradient."""
        pairs = []
        for at, layer in enumerate(cache.layers):
            pairs += zip(layer.new, self.past.gradients.get((index, at), (None, None)), strict=True)
            pairs += ((getattr(layer, name), outgoing.get((at, name))) for name in HELD)
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
        inputs["attention_mask"] = mask_for(self.model, self._seen(span))
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

    def _seen(self, span: range) -> Tensor:
        """(batch, 1, queries, keys), True where a token of the segment sees a key: the prompt, then thoughts."""
        at = torch.arange(-self.prompt, span.stop, device=self.ids.device)  # prompt tokens have negative numbers
        query = at[self.prompt + span.start :].unsqueeze(1)
        key = torch.cat([at[: self.prompt], at[self.prompt + self.schedule.first_visible(max(0, span.start)) :]])
        seen = ((key < 0) | (key >= self.schedule.first_visible(query))) & (key <= query)
        real = nn.functional.pad(self.mask[:, : self.prompt].bool(), (0, len(key) - self.prompt), value=True)
        # A padded query sees itself, so that no row of the softmax is empty.
        return ((seen & real.unsqueeze(1)) | (key == query)).unsqueeze(1)

    def _cache(self) -> BoundedCache:
        cache = BoundedCache.from_schedule(self.schedule)
        cache.layer_class_to_replicate = partial(SegmentLayer, self.schedule)
        return cache

    def _enter(self, index: int, anchor: Tensor) -> tuple[BoundedCache, dict[tuple[int, str], Tensor]]:
        """The cache as segment `index` found it, and of it the leaves at which gradients stop, by layer and name."""
        cache, taken, fed = self._cache(), {}, self.spans[index].start
        if fed < 0:
            return cache, taken
        oldest = self.schedule.first_visible(fed - 1) if fed else 0  # what the token before left there
        pieces = self.past.pieces(oldest, fed)
        for at, encoder in enumerate(self.entered[index]):
            layer = cache.layer(at)
            layer.dtype, layer.device, layer.is_initialized = self.past.kept[0][at][0].dtype, self.ids.device, True
            layer.prompt, layer.fed, layer.owner = self.prompt, fed, encoder["owner"]
            layer.evicted = self.schedule.evictions(fed)
            layer.fetch = partial(_Fetch.apply, anchor, self.past, at, pieces)
            for name in HELD:
                if encoder[name] is not None:
                    taken[at, name] = encoder[name].detach().requires_grad_()
                    setattr(layer, name, taken[at, name])
        return cache, taken


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
