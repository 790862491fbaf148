"""The rollout engine: one token for every row at a time, in buffers and shapes that never change.

A *row* is a place for one sequence. Prompts wait in order; a row takes the next one as soon as its sequence has ended,
and when none waits, the rows still going move together (at half their number, so that sizes are few). Each distinct
prompt is prefilled once and copied to the completions that share it. Evictions happen between steps, for the rows
that are due.

All that changes from step to step lies in tensors on the device: tokens, counts, the mask, the random numbers, what
was sampled. So on CUDA a step is captured as a graph, once per number of rows, and replayed; the host looks at the
results every `SYNC_EVERY` steps only. `rollout.plain_rollout` is the reference implementation: the same
algorithm without any of this.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pte_trl.adapter.model import evicted_encoders
from pte_trl.cache.bounded import BoundedCache
from pte_trl.cache.masks import mask_for
from pte_trl.rollouts.prompts import left_pad
from pte_trl.rollouts.ring import RingCache, ring_size
from pte_trl.rollouts.sampling import Sampling, sample

SYNC_EVERY = {"cuda": 16}  # steps between two looks at what has ended; 1 where looking costs nothing
PREFILL_TOKENS = 16_384  # of one prefill, so that its activations stay small


class CudaGraphed:
    """A function that changes tensors in place: called as it is, on CUDA captured at its second call and replayed.

    Captures are kept by the arguments, which have to be plain values; the tensors must be the same every time.
    """

    def __init__(self, function: Callable[..., None], on: bool):
        self.function, self.on = function, on
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}
        self.pool = torch.cuda.graph_pool_handle() if on else None

    def __call__(self, *key) -> None:
        if not self.on or key not in self.graphs:  # the first call warms up, and counts
            self.graphs[key] = None
            self.function(*key)
            return
        if self.graphs[key] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self.function(*key)
            self.graphs[key] = graph
        self.graphs[key].replay()

    def clear(self) -> None:
        self.graphs.clear()


class Engine:
    """Rows, their cache, and the loop that keeps them busy.

    Args:
        model: in eval mode; its weights may change between runs, but not where they lie.
        rows: sequences that are decoded together at most.
        window, evict_ratio: the cache policy.
        prompt: tokens of the longest prompt.
        sampling: how tokens are drawn.
    """

    def __init__(self, model: nn.Module, rows: int, window: int, evict_ratio: float, prompt: int, sampling: Sampling):
        self.model, self.sampling, self.device = model, sampling, model.device
        ring = ring_size(window, sampling.max_new_tokens)
        self.cache = RingCache(window, evict_ratio, rows, prompt, ring, self.device)
        self.schedule, self.look = self.cache.schedule, SYNC_EVERY.get(self.device.type, 1)
        self.unit = 16 if self.device.type == "cpu" else max(64, -(-self.cache.places // 4))  # graphs shall be few
        cuda = self.device.type == "cuda"
        self._step, self._evict = CudaGraphed(self._feed, cuda), CudaGraphed(self._drop, cuda)

        def whole(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.long, device=self.device)

        # Of every row: its sample, the token to feed, tokens sampled so far, prompt tokens, whether it goes on.
        self.sample, self.token, self.count, self.length = (whole(rows) for _ in range(4))
        self.alive = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self.every, self.due = torch.arange(rows, device=self.device), whole(rows)
        self.stops = torch.tensor(sampling.eos_token_ids, device=self.device)
        self.ids = whole(0, 0)

    # ---- one batch of prompts --------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, prompts: list[list[int]], copies: list[int], draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Completions of `prompts`, sample i being one of prompt `copies[i]`.

        Args:
            draws: (samples, max_new_tokens) numbers in [0, 1) that decide the tokens.

        Returns:
            ids and log-probs, (samples, max_new_tokens), and lengths, (samples,).
        """
        count = len(draws)
        self._make_records(draws)
        self.prompts, self.copies = prompts, copies
        self.encoders = evicted_encoders(self.model)
        self.waiting = list(range(count))[::-1]
        self.going = min(self.cache.rows, count)  # rows in use, the first ones
        self.counts, self.holds = [0] * self.going, [-1] * self.going  # on the host: tokens sampled, prompt held
        self.first_logits: dict[int, Tensor] = {}
        self.cache.begun = False
        self._fill(range(self.going))
        since = 0
        while True:
            if since % self.look == 0 and not self._turn_over():
                return self.ids[:count], self.logps[:count], self.lengths[:count]
            self._evict_due()
            reach = self.cache.prompt + min(max(self.counts), self.cache.ring)
            self._step(self.going, min(self.cache.places, -(-reach // self.unit) * self.unit))
            self.counts = [n + 1 for n in self.counts]
            since += 1

    def _make_records(self, draws: Tensor) -> None:
        """Where random numbers are read and results are written: the same tensors as long as their shape stays."""
        if len(self.ids) != len(draws) + 1:
            self._step.clear()  # what is captured writes into the old ones
            # One line more than samples: rows whose sequence has ended write there until they are looked at.
            shape = (len(draws) + 1, self.sampling.max_new_tokens)
            self.ids = torch.zeros(shape, dtype=torch.long, device=self.device)
            self.logps = torch.zeros(shape, device=self.device)
            self.lengths = torch.zeros(shape[0], dtype=torch.long, device=self.device)
            self.draws = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.ids.fill_(self.sampling.pad_token_id)
        self.logps.zero_()
        self.draws[:-1] = draws

    def _turn_over(self) -> bool:
        """Gives ended rows to those who wait, or moves the others together; False when all is done."""
        while True:
            alive = self.alive[: self.going].tolist()
            ended = [row for row, on in enumerate(alive) if not on]
            if not (self.waiting and ended):
                break
            self._fill(ended[: len(self.waiting)])  # whose first token may be the last
        if len(ended) == len(alive):
            return False
        left = len(alive) - len(ended)
        if 2 * left <= len(alive):
            size = left if self.look == 1 else 1 << (left - 1).bit_length()
            rows = [row for row, on in enumerate(alive) if on] + ended[: size - left]
            index = torch.tensor(rows, device=self.device)
            self.cache.gather(index)
            for state in (self.sample, self.token, self.count, self.length, self.alive):
                state[:size] = state[index]
            self.counts, self.holds = ([of[row] for row in rows] for of in (self.counts, self.holds))
            self.going = size
        return True

    # ---- prompts -----------------------------------------------------------------------------------------------

    def _fill(self, rows) -> None:
        """Starts the next waiting samples in these rows, and draws their first tokens."""
        taken = {row: self.waiting.pop() for row in rows}
        prompts = {row: self.copies[sample] for row, sample in taken.items()}
        origins = {prompt: row for row, prompt in enumerate(self.holds)}
        known = {row: origins[p] for row, p in prompts.items() if p in origins and p in self.first_logits}
        if known:  # before any row is written over
            self.cache.copy_prompts(self._index(known.keys()), self._index(known.values()))
        new = {p: row for row, p in reversed(prompts.items()) if row not in known}
        self._prefill({row: p for p, row in new.items()})
        shared = {row: new[p] for row, p in prompts.items() if row not in known and new[p] != row}
        if shared:
            self.cache.copy_prompts(self._index(shared.keys()), self._index(shared.values()))
        index = self._index(rows)
        self.sample[index] = self._index(taken.values())
        self.length[index] = self._index(len(self.prompts[p]) for p in prompts.values())
        self.count[index], self.alive[index] = 0, True
        for row, prompt in prompts.items():
            self.counts[row], self.holds[row] = 1, prompt
        self._draw(index, torch.stack([self.first_logits[p] for p in prompts.values()]))
        later = {self.copies[sample] for sample in self.waiting}
        self.first_logits = {p: logits for p, logits in self.first_logits.items() if p in later}

    def _index(self, numbers) -> Tensor:
        return torch.tensor(list(numbers), device=self.device)

    def _prefill(self, prompts: dict[int, int]) -> None:
        """Row -> prompt: fills them, a part at a time, and keeps the logits after each prompt."""
        todo = list(prompts.items())
        size = max(1, PREFILL_TOKENS // self.cache.prompt)
        for part in (todo[at : at + size] for at in range(0, len(todo), size)):
            tokens, mask = left_pad([self.prompts[p] for _, p in part], self.sampling.pad_token_id, self.device)
            source = BoundedCache(self.schedule.window, self.schedule.evict_ratio)
            position = (mask.cumsum(1) - 1).clamp(min=0)
            logits = self._forward(tokens, mask, position, source)
            self.cache.load(self._index(row for row, _ in part), source, mask)
            self.first_logits.update(zip((p for _, p in part), logits, strict=True))

    def _forward(self, tokens: Tensor, mask: Tensor, position: Tensor, cache: BoundedCache) -> Tensor:
        """(batch, vocabulary) logits after the last token."""
        kind = self.device.type
        # Without autocast's own cache of cast weights: a captured step would go on reading what is gone by then.
        with torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        ):
            return self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

    # ---- steps -------------------------------------------------------------------------------------------------

    def _feed(self, going: int, limit: int) -> None:
        """One step of the first `going` rows: feeds their token, draws the next."""
        rows, thought = self.every[:going], self.count[:going] - 1
        place = self.cache.place_of(thought)
        self.cache.seen[rows, place] = True
        for layer in self.cache.layers:
            layer.aim(rows, place, limit)
        mask = mask_for(self.model, self.cache.seen[:going, None, None, :limit])
        position = (self.length[:going] + thought).unsqueeze(1)
        self._draw(rows, self._forward(self.token[:going].unsqueeze(1), mask, position, self.cache))

    def _draw(self, rows: Tensor, logits: Tensor) -> None:
        """Samples one token per row from its logits, and writes down what it is."""
        alive, at = self.alive[rows], self.count[rows]
        line = self.sample[rows].masked_fill(~alive, len(self.ids) - 1)  # a scalar `where` copies from the host
        column = at.clamp(max=self.ids.shape[1] - 1)
        token, logp = sample(logits, self.sampling.temperature, self.sampling.top_p, self.draws[line, column])
        self.ids[line, column], self.logps[line, column], self.lengths[line] = token, logp, at + 1
        stopped = (token.unsqueeze(1) == self.stops).any(1)
        self.token[rows], self.count[rows] = token, at + 1
        self.alive[rows] = alive & ~stopped & (at + 1 < self.ids.shape[1])

    def _evict_due(self) -> None:
        """Evicts in the rows whose next token finds a full window; their number is filled up to one of few sizes."""
        k = self.schedule.evictions_before
        due = [row for row, n in enumerate(self.counts) if k(n - 1) > k(n - 2)]
        if due and self.cache.ring == self.schedule.window:
            size = len(due) if self.look == 1 else min(self.going, 1 << (len(due) - 1).bit_length())
            self.due[:size] = self._index(due + due[-1:] * (size - len(due)))
            self._evict(size)

    def _drop(self, size: int) -> None:
        rows = self.due[:size]
        oldest = self.schedule.first_visible(self.count[rows] - 2)  # what the token fed last still saw
        self.cache.evict(rows, oldest, self.encoders)
