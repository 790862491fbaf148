"""What is measured of an architecture: its views against each other, on left-padded prompts over many evictions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pte_trl.adapter.fit import check_supported
from pte_trl.adapter.placement import attention_modules, linear_place
from pte_trl.adapter.self_test import RUNNING
from pte_trl.adapter.settings import LINEARS
from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.segment_run import check_states_taken_up, takes_up_states
from pte_trl.replay.segments import segment_logps
from pte_trl.rollouts.rollout import rollout
from tests.models import TEMPERATURE, chosen, decode_logps, gap, left_padded_batch, replay_logps, with_pte
from tests.zoo import Row, config_of_row, tiny_of

WINDOW, COMPLETION = 6, 21  # E = 2: 7 evictions, and no piece between two of them is a single token
CUT = 9  # thought tokens of a segment: no multiple of E, and longer than W
IDS, MASK, PROMPT = left_padded_batch([7, 3], COMPLETION)
# Of mixed sign, as advantages are: a plain sum would hide errors that cancel.
WEIGHTS = torch.randn(2, COMPLETION, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
ARMS = ("bare", "pte", "pte-all")


class Wide(TorchFunctionMode):
    """float64 wherever a model asks for float32: in routers, norms, recurrences, rotary embeddings.

    Rounding then hides nothing, and one bound serves all architectures.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double().contiguous()  # as a change of precision leaves it
        widened = [torch.float64 if x is torch.float32 else x for x in args]
        return func(*widened, **{k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()})


def widened(model: nn.Module) -> None:
    """Every forward of the model, from whatever place, inside `Wide`."""
    forward = model.forward

    def wide(*args, **kwargs):
        with Wide():
            return forward(*args, **kwargs)

    model.forward = wide


@dataclass(frozen=True)
class Cell:
    """What a view measured.

    Attributes:
        gap: the largest difference between the two sides: of a log-prob, or relative of a gradient.
        contrast: what the difference would be with another window.
    """

    gap: float
    contrast: float


def model_of(
    row: Row, arm: str, trusted: bool = False, attention: str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The row's tiny model, bare or with a random adapter.

    Args:
        trusted: without a self-test at load.

    Raises:
        ValueError: the architecture is refused.
    """
    with without_self_test() if trusted else nullcontext():
        check_supported(config_of_row(row), "lora_c" if arm == "bare" else "pte", attention=attention or row.attention)
        torch.manual_seed(0)
        model = tiny_of(row, attention, dtype)
        if arm == "bare":
            return model
        return with_pte(model, target_modules=["q_proj", "o_proj"] if arm == "pte" else everything(model))


@contextmanager
def without_self_test() -> Iterator[None]:
    """As inside a self-test, which runs no other one."""
    token = RUNNING.set(True)
    try:
        yield
    finally:
        RUNNING.reset(token)


def everything(model: nn.Module) -> list[str]:
    """The linears that PTE can adapt in every layer it goes into."""
    modules = dict(model.named_modules())

    def has(attention: str, name: str) -> bool:
        found = linear_place(modules[attention.rpartition(".")[0]], modules[attention], name)
        return found is not None and type(getattr(*found)) is nn.Linear

    return [name for name in LINEARS if all(has(attention, name) for attention in attention_modules(model))]


@torch.no_grad()
def replay(model: nn.Module, window: int = WINDOW) -> Cell:
    """The decode, token by token, against one pass."""
    decoded = decode_logps(model, IDS, MASK, PROMPT, window)
    replayed, other = (replay_logps(model, IDS, MASK, PROMPT, w) for w in (window, window + 1))
    return Cell(gap(decoded, replayed), gap(replayed, other))


@torch.no_grad()
def chunks(model: nn.Module, window: int = WINDOW) -> Cell:
    """The decode in the longest pieces that no eviction interrupts, against one pass."""
    check_states_taken_up(model)  # `feed` then goes token by token
    decoded = decode_logps(model, IDS, MASK, PROMPT, window, chunked=True)
    replayed, other = (replay_logps(model, IDS, MASK, PROMPT, w) for w in (window, window + 1))
    return Cell(gap(decoded, replayed), gap(replayed, other))


def engine(model: nn.Module, window: int = WINDOW) -> Cell:
    """The engine, two rows for three completions of two prompts, against the reference and against a replay."""
    prompts = [[5, 9, 3, 7, 11, 2, 8], [4, 13, 6], [4, 13, 6]]
    options = {"max_new_tokens": 16, "eos_token_ids": [1], "pad_token_id": 0, "temperature": TEMPERATURE}
    options |= {"policy": CachePolicy(window), "seeds": [*range(3)]}
    fast, plain = (rollout(model, prompts, **options, **more) for more in ({"batch_size": 2}, {"reference": True}))
    if fast.completion_ids != plain.completion_ids:
        return Cell(float("inf"), 0.0)
    samples = list(zip(prompts, fast.completion_ids, strict=True))
    found, reference = (torch.tensor([*chain(*run.logprobs)]) for run in (fast, plain))
    right, other = (torch.cat([_scored(model, *each, w) for each in samples]) for w in (window, window + 1))
    return Cell(max(gap(found, reference), gap(found, right)), gap(right, other))


@torch.no_grad()
def _scored(model: nn.Module, prompt: list[int], ids: list[int], window: int) -> torch.Tensor:
    tokens = torch.tensor([prompt + ids])
    logps = replay_logps(model, tokens, torch.ones_like(tokens), len(prompt), window)
    return chosen(logps, tokens, len(prompt))[0]


def segments(model: nn.Module, window: int = WINDOW) -> Cell:
    """Segment by segment against one pass, log-probs and gradients."""

    def by_segments(w: int = window):
        return segment_logps(model, IDS, MASK, PROMPT, Schedule(w), segment_length=CUT, temperature=TEMPERATURE)[0]

    return _both(model, by_segments, lambda: in_one_pass(model, window), lambda: in_one_pass(model, window + 1))


class NotMeasured(ValueError):
    """A view that transformers' own code of an architecture does not allow."""


def gradient(model: nn.Module, window: int = WINDOW) -> Cell:
    """Gradients of one pass against autograd through the decode's cache.

    transformers' step of a single token writes the state of a Mamba layer in place, which autograd refuses. The decode
    is then the one in pieces of several tokens, whose equality with the one token by token is the view `chunks`.

    Raises:
        NotMeasured: a piece of several tokens forgets the state as well.
    """

    def decoded(chunked: bool = False):
        return chosen(decode_logps(model, IDS, MASK, PROMPT, window, chunked=chunked), IDS, PROMPT)

    def compared(view: Callable) -> Cell:
        return _both(model, lambda: in_one_pass(model, window), view, lambda: in_one_pass(model, window + 1))

    try:
        return compared(decoded)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
    if not takes_up_states(model):
        raise NotMeasured(
            "its recurrent step of one token writes the states in place, which autograd refuses, and a step of "
            "several begins from an empty state"
        )
    return compared(lambda: decoded(chunked=True))


def in_one_pass(model: nn.Module, window: int) -> torch.Tensor:
    return chosen(replay_logps(model, IDS, MASK, PROMPT, window), IDS, PROMPT)


def _both(model: nn.Module, view: Callable, expected: Callable, other: Callable) -> Cell:
    (found, mine), (right, gradients), (wrong, theirs) = (_with_gradients(model, f) for f in (view, expected, other))
    return Cell(
        max(gap(found, right), _relative(mine, gradients)), min(gap(wrong, right), _relative(theirs, gradients))
    )


def _with_gradients(model: nn.Module, logps: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    found = logps()
    (found * WEIGHTS.to(found.dtype)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return found.detach(), gradients


def _relative(found: dict, expected: dict) -> float:
    """The largest error of a tensor's gradient, by its norm; those of nearly no gradient count by the largest one."""
    for gradients, other in ((found, expected), (expected, found)):
        gradients |= {name: torch.zeros_like(other[name]) for name in other.keys() - gradients.keys()}
    floor = 1e-3 * max(gradient.norm() for gradient in expected.values())
    return max(((found[n] - g).norm() / max(g.norm(), floor)).item() for n, g in expected.items())


SHARE = 0.01  # of what another window would change, that rounding may reach at most


def allowed(row: Row, view: str) -> float:
    """The largest gap of a cell; the engine keeps log-probs in float32, whose numbers around 32 lie 4e-6 apart."""
    return max(row.bound, 4e-6) if view == "engine" else row.bound


VIEWS = {view.__name__: view for view in (replay, chunks, engine, segments, gradient)}


def measure(row: Row, view: str, arm: str, window: int = WINDOW, **changes) -> Cell:
    """One cell of the table.

    Args:
        changes: of `model_of`.

    Raises:
        ValueError: the architecture, or PTE or the view for it, is refused.
    """
    model = model_of(row, arm, **changes)
    if model.dtype == torch.float64:
        widened(model)
    return VIEWS[view](model, window)
