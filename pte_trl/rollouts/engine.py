"""The rollout engine: one token for every row at a time, in buffers and shapes that never change.

A *row* is a place for one sequence. Prompts wait in order; a row takes the next one as soon as its sequence has ended.
When none waits, the unfinished rows are moved to the front (each time at half their number, so that sizes are few).
Each distinct prompt is prefilled once and copied to the completions that share it. Every completion has a schedule of
its own: rows of different windows are decoded together. Evictions happen between steps, for the rows that are due.

All that changes from step to step lies in tensors on the device: tokens, counts, the mask, the random numbers, what
was sampled. So on CUDA a step is captured as a graph, once per number of rows, and replayed; the host reads results
every `SYNC_EVERY` steps only. `pte_trl.rollouts.reference` is the reference implementation: the same algorithm without
any of this.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pte_trl.adapter.model import evicted_encoders
from pte_trl.cache.bounded import BoundedCache
from pte_trl.cache.masks import prompt_mask
from pte_trl.cache.schedule import Schedule
from pte_trl.rollouts.compiled import CompiledStep, is_capturing, say
from pte_trl.rollouts.decoder import FAMILIES, base_of
from pte_trl.rollouts.draw import draw
from pte_trl.rollouts.graphs import CudaGraphed
from pte_trl.rollouts.prompts import left_pad
from pte_trl.rollouts.ring import ALIGN, RingCache, aligned, ring_size
from pte_trl.rollouts.sampling import Sampling
from pte_trl.transfer import uploaded

# Steps between two reads of which rows have ended. A read waits for the GPU, which then idles until the host has
# queued the next step; on a CPU it costs nothing, so every step is followed by one.
SYNC_EVERY = {"cuda": 16}
PREFILL_TOKENS = 16_384  # tokens of one prefill at most, so that its activations stay small
NEVER = 0  # in `Row.evicts_at`: counts begin at 1


@dataclass(frozen=True)
class Room:
    """What a row has to have room for.

    Attributes:
        places: prompt and thought tokens that the cache holds at most; a multiple of `pte_trl.rollouts.ring.ALIGN`.
        evict: tokens that leave at once at most.
        tokens: prompt and thought tokens at most, evicted ones included.
    """

    places: int
    evict: int
    tokens: int

    @classmethod
    def needed(cls, prompts: Iterable[int], schedules: Sequence[Schedule], max_new_tokens: int) -> "Room":
        """That of completions of prompts of so many tokens; two lists of the same length."""
        prompts = list(prompts)
        pairs = zip(prompts, schedules, strict=True)
        places = max(prompt + ring_size(schedule.window, max_new_tokens) for prompt, schedule in pairs)
        # A window as long as a completion is never full, and nothing leaves it.
        evict = max((s.evict for s in schedules if s.window < max_new_tokens), default=1)
        return cls(aligned(places), evict, aligned(max(prompts) + max_new_tokens))


@dataclass
class Row:
    """The host's own copy of what a row does, so that planning a step never reads from the device.

    A row that has ended but is not looked at yet is still counted here and on the device alike.

    Attributes:
        sample: whose completion it writes.
        prompt: which of the distinct prompts lies there, `length` tokens long.
        ring: places for thoughts.
        evicts_at: the count at which the window is full.
        count: tokens sampled so far.
    """

    sample: int
    prompt: int
    length: int
    schedule: Schedule
    ring: int
    evicts_at: int
    count: int = 1

    @property
    def held(self) -> int:
        """Places that it attends to when its next token is fed."""
        return self.length + min(self.count, self.ring)


def precision(device: torch.device) -> torch.autocast:
    """The autocast under way, without its cache.

    Autocast keeps weights that it has cast until its context ends, and a graph captured inside would go on reading
    that freed memory; so nothing is kept, and every graph casts the weights itself.
    """
    kind = device.type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)


class Engine:
    """Rows, their cache, and the loop that keeps them busy.

    Args:
        model: in eval mode; its weights may change between runs, but not where they lie.
        rows: sequences that are decoded together at most.
        room: of a row.
        sampling: how tokens are drawn.
        compile: whether steps are compiled (`pte_trl.rollouts.compiled`), where the model and the machine allow it.
    """

    def __init__(self, model: nn.Module, rows: int, room: Room, sampling: Sampling, compile: bool = False):
        self.model, self.sampling, self.device = model, sampling, model.device
        self.cache = RingCache(rows, room.places, room.evict, self.device, room.tokens)
        self.compiled = CompiledStep(model, self.cache) if compile else None
        self.sync_every = SYNC_EVERY.get(self.device.type, 1)
        # Attention reads the cache up to a multiple of `reach_step` places. Every multiple is another graph, so there
        # are four at most on CUDA; on a CPU, where nothing is captured, small multiples save work.
        cuda = self.device.type == "cuda"
        self.reach_step = max(64, aligned(-(-self.cache.places // 4))) if cuda else ALIGN
        never_waits = type(base_of(model)) in FAMILIES  # their steps are known to wait for nothing
        self._step, self._evict = (CudaGraphed(function, cuda, never_waits) for function in (self._feed, self._drop))

        def zeros(*shape: int) -> Tensor:
            """Integers; made once and only written in place from then on, since graphs read them where they lie."""
            return torch.zeros(*shape, dtype=torch.long, device=self.device)

        # Of every row, (rows,): its sample, the token to feed next, tokens sampled so far, and whether it goes on.
        self.sample, self.token, self.count = (zeros(rows) for _ in range(3))
        self.alive = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self.row_numbers = torch.arange(rows, device=self.device)
        # What the next eviction takes: the rows, the oldest thought of each, and how many leave.
        self.due = zeros(3, rows)
        self.eos_token_ids = torch.tensor(sampling.eos_token_ids, device=self.device)
        self.ids = zeros(0, 0)

    def close(self) -> None:
        """Frees buffers and graphs at once; the engine cannot be used any more.

        Its captured functions are methods of it: a cycle, which the garbage collector would find much later.
        """
        vars(self).clear()

    # ---- one batch of prompts --------------------------------------------------------------------------------

    @torch.no_grad()
    def run(
        self,
        prompts: list[list[int]],
        prompt_index: list[int],
        schedules: Sequence[Schedule],
        draws: Tensor,
        rows: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One completion for every entry of `prompt_index`.

        Args:
            prompts: token ids of the distinct prompts.
            prompt_index: (samples,), which of them sample i completes.
            schedules: (samples,), when which thought token of sample i leaves. The engine must have room for them.
            draws: (samples, max_new_tokens) numbers in [0, 1) that decide the tokens.
            rows: decoded together at most; None: all that the engine has.

        Returns:
            ids and log-probs, (samples, max_new_tokens), and lengths, (samples,).
        """
        count = len(draws)
        self._make_records(draws)
        self.prompts, self.prompt_index, self.schedules = prompts, prompt_index, schedules
        self.encoders = evicted_encoders(self.model)
        self._or_eagerly(lambda: self.compiled.refresh())
        self.waiting = list(range(count))[::-1]  # samples that have no row yet, the next one last
        self.active = min(self.cache.rows, rows or count, count)  # rows in use: the first so many
        self.rows: list[Row | None] = [None] * self.active
        # Of each prompt that lies in a row and that samples wait for: logits after it, and what decoding writes over.
        self.first_logits: dict[int, Tensor] = {}
        self.saved: dict[int, list[Tensor]] = {}
        self.cache.begun = False
        self._start_samples(range(self.active))
        steps = 0
        while True:
            if steps % self.sync_every == 0 and not self._turn_over():
                return self.ids[:count], self.logps[:count], self.lengths[:count]
            self._evict_due()
            reach = max(row.held for row in self.rows)
            self._step(self.active, min(self.cache.places, -(-reach // self.reach_step) * self.reach_step))
            for row in self.rows:
                row.count += 1
            steps += 1

    def _make_records(self, draws: Tensor) -> None:
        """Where random numbers are read and results are written: the same tensors as long as they are long enough."""
        if len(self.ids) <= len(draws):
            self._step.clear()  # the graphs write into the old tensors
            # One line more than samples: between two reads by the host, rows that have ended keep being fed, and what
            # they draw must go somewhere. A branch per row could not be captured.
            shape = (len(draws) + 1, self.sampling.max_new_tokens)
            self.ids = torch.zeros(shape, dtype=torch.long, device=self.device)
            self.logps = torch.zeros(shape, device=self.device)
            self.lengths = torch.zeros(shape[0], dtype=torch.long, device=self.device)
            self.draws = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.ids.fill_(self.sampling.pad_token_id)
        self.logps.zero_()
        self.draws[: len(draws)] = draws

    def _turn_over(self) -> bool:
        """Gives ended rows to waiting samples, or moves the other rows to the front; False when all is done."""
        while True:
            alive = self.alive[: self.active].tolist()  # waits for the device: the one regular read
            ended = [row for row, on in enumerate(alive) if not on]
            if not (self.waiting and ended):
                break
            self._start_samples(ended[: len(self.waiting)])  # again, since a first token may be the last
        if len(ended) == len(alive):
            return False
        left = len(alive) - len(ended)
        if 2 * left <= len(alive):
            # A power of two where steps are captured: every number of rows is another graph.
            size = left if self.sync_every == 1 else 1 << (left - 1).bit_length()
            rows = [row for row, on in enumerate(alive) if on] + ended[: size - left]
            self._move_to_front(rows)
        return True

    def _move_to_front(self, rows: list[int]) -> None:
        """Makes `rows` the first ones, in this order, and the only ones in use."""
        index, size = self._index(rows), len(rows)
        self.cache.gather(index)
        for state in (self.sample, self.token, self.count, self.alive):
            state[:size] = state[index]
        self.rows = [self.rows[row] for row in rows]
        self.active = size

    # ---- prompts -----------------------------------------------------------------------------------------------

    def _start_samples(self, rows: Iterable[int]) -> None:
        """Starts the next waiting samples in these rows, and draws their first tokens."""
        started = {row: self._row(self.waiting.pop()) for row in rows}
        self._load_prompts({row: new.prompt for row, new in started.items()})
        index = self._index(started)
        sample, length, ring = (
            self._index(getattr(new, name) for new in started.values()) for name in ("sample", "length", "ring")
        )
        self.cache.start(index, length, ring)
        self.sample[index] = sample
        self.count.index_fill_(0, index, 0)
        self.alive.index_fill_(0, index, True)
        for row, new in started.items():
            self.rows[row] = new
        self._draw(index, torch.stack([self.first_logits[new.prompt] for new in started.values()]))
        held = self._waiting_prompts() & {row.prompt for row in self.rows}
        self.first_logits = {prompt: logits for prompt, logits in self.first_logits.items() if prompt in held}
        self.saved = {prompt: states for prompt, states in self.saved.items() if prompt in held}

    def _waiting_prompts(self) -> set[int]:
        return {self.prompt_index[sample] for sample in self.waiting}

    def _row(self, sample: int) -> Row:
        """One that has sampled its first token."""
        prompt, schedule = self.prompt_index[sample], self.schedules[sample]
        ring = ring_size(schedule.window, self.sampling.max_new_tokens)
        # A row of count n has fed n - 1 thoughts. A window as long as a completion is never full.
        evicts_at = 1 + schedule.room(0) if schedule.window < self.sampling.max_new_tokens else NEVER
        return Row(sample, prompt, len(self.prompts[prompt]), schedule, ring, evicts_at)

    def _load_prompts(self, prompt_of: dict[int, int]) -> None:
        """Row -> prompt: puts the prompts into the cache. Each is computed once; a row that has it is copied from."""
        # An eviction takes thoughts only, so a row holds its prompt as long as no other prompt is loaded there.
        row_with = {old.prompt: row for row, old in enumerate(self.rows) if old is not None}
        origins = {row: row_with[p] for row, p in prompt_of.items() if p in row_with and p in self.first_logits}
        self._copy(origins, prompt_of)  # first of all: the rows copied from may be among those that start now
        if origins:  # and they have decoded since
            self.cache.restore(self._index(origins), [self.saved[prompt_of[row]] for row in origins])
        prefilled = {p: row for row, p in reversed(prompt_of.items()) if row not in origins}  # the first row of each
        self._prefill({row: p for p, row in prefilled.items()})
        shared = {row: prefilled[p] for row, p in prompt_of.items() if row not in origins and prefilled[p] != row}
        self._copy(shared, prompt_of)

    def _copy(self, origins: dict[int, int], prompt_of: dict[int, int]) -> None:
        """Row -> row that its prompt is copied from."""
        if origins:
            longest = max(len(self.prompts[prompt_of[row]]) for row in origins)
            self.cache.copy_prompts(self._index(origins), self._index(origins.values()), longest)

    def _index(self, numbers: Iterable[int]) -> Tensor:
        return uploaded(list(numbers), self.device)

    def _prefill(self, prompts: dict[int, int]) -> None:
        """Row -> prompt: fills them, a part at a time, and keeps the logits after each prompt."""
        todo, waiting = list(prompts.items()), self._waiting_prompts()
        size = max(1, PREFILL_TOKENS // max((len(self.prompts[p]) for _, p in todo), default=1))
        for part in (todo[at : at + size] for at in range(0, len(todo), size)):
            tokens, mask = left_pad([self.prompts[p] for _, p in part], self.sampling.pad_token_id, self.device)
            source = BoundedCache(window=1, config=self.model.config)  # it takes the prompts alone, and these stay
            position = (mask.cumsum(1) - 1).clamp(min=0)
            padded = len({len(self.prompts[p]) for _, p in part}) > 1
            logits = self._forward(tokens, prompt_mask(self.model, mask, padded), position, source)
            self.cache.load(self._index(row for row, _ in part), source, mask.sum(1))
            self.first_logits.update(zip((p for _, p in part), logits, strict=True))
            self.saved |= {p: self.cache.saved(row) for row, p in part if p in waiting}

    def _forward(self, tokens: Tensor, mask: Tensor | None, position: Tensor, cache: BoundedCache) -> Tensor:
        """(batch, vocabulary) logits after the last token."""
        with precision(self.device):
            return self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

    def _or_eagerly(self, call: Callable[[], Tensor | None]) -> Tensor | None:
        """What a call of the compiled step returns; None, and steps are eager from then on, where it fails."""
        if self.compiled is None:
            return None
        try:
            with precision(self.device):
                return call()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler does on a machine that we do not know
            if is_capturing(self.device):
                raise
            self.compiled = None
            self._step.clear()  # graphs of the compiled step, whose copies of adapters are not renewed any more
            reason = (str(error).strip().splitlines() or [""])[0]
            say(f"rollout: decode steps are not compiled but eager: {type(error).__name__}: {reason}")
            return None

    # ---- steps: these run inside CUDA graphs, so nothing here may read a tensor on the host ----------------------

    def _feed(self, active: int, limit: int) -> None:
        """One step of the first `active` rows: feeds their token, draws the next; attention sees `limit` places."""
        rows, thought = self.row_numbers[:active], self.count[:active] - 1
        place = self.cache.place_of(rows, thought)
        self.cache.seen[rows, place] = self.cache.shown
        # Positions count the tokens fed, not the places held, so they keep growing through evictions.
        position = self.cache.prompt[:active] + thought
        logits = self._or_eagerly(lambda: self.compiled(self.token[:active], position, rows, place, limit))
        self._draw(rows, self._eager(rows, position, place, limit) if logits is None else logits)

    def _eager(self, rows: Tensor, position: Tensor, place: Tensor, limit: int) -> Tensor:
        """(rows, vocabulary) logits after the rows' token, by the model's own forward."""
        self.cache.aim(rows, position, place, limit)
        mask = self.cache.mask(position, limit, self.model.dtype)
        return self._forward(self.token[: len(rows)].unsqueeze(1), mask, position.unsqueeze(1), self.cache)

    def _draw(self, rows: Tensor, logits: Tensor) -> None:
        """Samples one token per row from its logits, and writes down what it is."""
        alive, at = self.alive[rows], self.count[rows]
        # Ended rows write into the spare last line. `masked_fill` and not `where`, whose scalar comes from the host.
        line = self.sample[rows].masked_fill(~alive, len(self.ids) - 1)
        column = at.clamp(max=self.ids.shape[1] - 1)
        token, logp = draw(logits, self.sampling.temperature, self.sampling.top_p, self.draws[line, column])
        self.ids[line, column], self.logps[line, column], self.lengths[line] = token, logp, at + 1
        stopped = (token.unsqueeze(1) == self.eos_token_ids).any(1)
        self.token[rows], self.count[rows] = token, at + 1
        self.alive[rows] = alive & ~stopped & (at + 1 < self.ids.shape[1])

    def _evict_due(self) -> None:
        """Evicts in the rows whose next token finds a full window."""
        due = []
        for number, row in enumerate(self.rows):
            if row.count == row.evicts_at:
                fed, schedule = row.count - 1, row.schedule
                # From the oldest thought on that the token fed last still saw.
                due.append((number, schedule.first_visible(fed - 1), schedule.evict))
                row.evicts_at += schedule.room(fed)
        if due:
            # Filled up to a power of two by the last row again (each number is another graph): every copy of it
            # reads the same old state and writes the same new one.
            size = len(due) if self.sync_every == 1 else min(self.active, 1 << (len(due) - 1).bit_length())
            self.due[:, :size] = uploaded(due + due[-1:] * (size - len(due)), self.device).T
            self._evict(size)

    def _drop(self, size: int) -> None:
        self.cache.evict(*self.due[:, :size], self.encoders)
