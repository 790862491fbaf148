"""Whether a bounded cache is right in an architecture, found out on a small random copy before weights load.

What a model's code does between its layers cannot be seen from outside, and a wrong assumption about it is silent: it
shows in no error, only in log-probs that are not those of the rollout. So it is measured. A copy in float32 with
random weights decodes two padded sequences token by token and is replayed in one pass: with evictions, without any
(what rounding alone does). What evictions change at all is the size that a difference is compared with.

Never on the real model: in bfloat16 rounding hides errors, and a fresh adapter is the base model.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import GradientCheckpointingLayer, PreTrainedConfig
from transformers.utils import logging

from pte_trl.adapter.config import PteConfig
from pte_trl.adapter.small_copy import reduced, small_copy
from pte_trl.adapter.verdicts import kept
from pte_trl.cache.bounded import BoundedCache
from pte_trl.cache.masks import BLOCKWISE, MASKED_ATTENTION, is_mixed
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs
from pte_trl.replay.precision import without_autocast
from pte_trl.replay.segment_run import check_states_taken_up

PROMPTS, THOUGHTS, WINDOW = (5, 3), 14, 4  # tokens; E = 1, so that 10 tokens are evicted
ROUNDING, LEAST, SHARE = 10, 1e-4, 0.01  # accepted: that often the rounding, or the least; and less than the share
RUNNING: ContextVar[bool] = ContextVar("a self-test is running", default=False)


@dataclass(frozen=True)
class Verdict:
    """What a self-test has found.

    Attributes:
        fault: what is wrong, as one sentence; None if nothing is.
        gap: largest difference of a log-prob between decode and replay.
        rounding: the same without evictions.
        contrast: the same between decodes with and without evictions.
    """

    fault: str | None
    gap: float = 0.0
    rounding: float = 0.0
    contrast: float = 0.0


def check_by_self_test(
    config: PreTrainedConfig, method: str, adapter: PteConfig | None = None, attention: str | None = None
) -> None:
    """Refuses an architecture in which a replay would not repeat the decode.

    The result is kept beside the hub's cache (`pte_trl.adapter.verdicts`).

    Args:
        method: "pte" tests with an adapter, others the bare model.
        adapter: whose linears are adapted; None for q_proj and o_proj.
        attention: attention implementation the model will run with; None for transformers' choice.

    Raises:
        ValueError: with the layer, what differs there, and by how much.
    """
    if RUNNING.get():
        return  # of the copy itself
    targets = None
    if method == "pte":
        targets = sorted(adapter.target_modules if adapter is not None else PteConfig().target_modules)
    if attention in BLOCKWISE:
        attention = BLOCKWISE[0]
    elif attention not in MASKED_ATTENTION:
        attention = None
    small = reduced(config)
    verdict = Verdict(**kept(small, [targets, attention], lambda: vars(self_test(config, small, targets, attention))))
    if verdict.fault is not None:
        raise ValueError(verdict.fault)


def check_segments(config: PreTrainedConfig, attention: str | None = None) -> None:
    """Refuses `replay: segments` for an architecture in which a segment would forget what came before it.

    Args:
        attention: as `check_by_self_test`.

    Raises:
        ValueError: as `check_states_taken_up`, found out on a small random copy.
    """
    small = reduced(config)

    def run() -> dict[str, str | None]:
        with _apart():
            try:
                check_states_taken_up(_model(config, small, attention if attention in MASKED_ATTENTION else None))
            except ValueError as error:
                return {"fault": str(error)}
        return {"fault": None}

    if is_mixed(config) and (fault := kept(small, "segments", run)["fault"]):
        raise ValueError(fault)


def self_test(
    config: PreTrainedConfig, small: PreTrainedConfig, targets: list[str] | None, attention: str | None
) -> Verdict:
    """Runs the test.

    Args:
        small: `reduced(config)`; a copy with as many heads as `config` is taken where it makes no model.
        targets: linears that PTE adapts; None for the bare model.
    """
    kind = f"model_type={small.model_type!r}: a small random copy"
    with _apart():
        try:
            model = _model(config, small, attention)
        except Exception as error:
            return Verdict(f"{kind} cannot be made ({_first_line(error)})")
        try:
            model = model if targets is None else _adapted(model, targets)
        except ValueError as error:  # a refusal, which says what it is about
            return Verdict(f"model_type={small.model_type!r}: {error}")
        try:
            return _measured(model, kind)
        except Exception as error:
            return Verdict(f"{kind} cannot be decoded and replayed ({_first_line(error)})")


@contextmanager
def _apart() -> Iterator[None]:
    """The caller's random numbers, autograd and autocast are left alone, and play no part."""
    token, verbosity = RUNNING.set(True), logging.get_verbosity()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.device("cpu"),
            without_autocast(torch.device("cpu")),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            logging.set_verbosity_error()
            torch.manual_seed(0)
            yield
    finally:
        logging.set_verbosity(verbosity)
        RUNNING.reset(token)


def _model(config: PreTrainedConfig, small: PreTrainedConfig, attention: str | None) -> nn.Module:
    try:
        model = small_copy(small, attention)
        model(torch.ones(1, 2, dtype=torch.long), use_cache=False)
        return model
    except Exception:
        return small_copy(reduced(config, heads=False), attention)


def _adapted(model: nn.Module, targets: list[str]) -> nn.Module:
    config = PteConfig(rank=4, num_global_tokens=4, alpha=4.0, target_modules=targets)
    model = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    for name, parameter in model.named_parameters():
        if "pte_up" in name:  # zero in a fresh adapter, which is the base model
            parameter.normal_(std=0.1)
    return model


def _measured(model: nn.Module, kind: str) -> Verdict:
    ids, mask, prompt = _batch(model.config.get_text_config(decoder=True).vocab_size)
    decoded, outputs = _decode(model, ids, mask, prompt, WINDOW)
    replayed, again = _replay(model, ids, mask, prompt, WINDOW)
    plain, _ = _decode(model, ids, mask, prompt, THOUGHTS)
    gap = _gap(decoded, replayed)
    rounding = _gap(plain, _replay(model, ids, mask, prompt, THOUGHTS)[0])
    contrast = _gap(decoded, plain)
    allowed = min(max(ROUNDING * rounding, LEAST), SHARE * contrast)
    fault = None
    if not gap <= allowed:  # a NaN as well
        fault = (
            f"{kind} gives other log-probs in a replay than in its decode, by {gap:.2g} ({rounding:.1g} without "
            f"evictions, which change {contrast:.2g}), {_where(outputs, again, mask, allowed)}"
            f"{_reason(model, ids, mask, prompt)}"
        )
    return Verdict(fault, gap, rounding, contrast)


def _where(decoded: dict[str, Tensor], replayed: dict[str, Tensor], mask: Tensor, allowed: float) -> str:
    """The first layer whose output differs."""
    real = mask[:, :-1].bool()
    for name, output in decoded.items():
        gap = _gap(output[real], replayed[name][:, :-1][real])
        if not gap <= allowed:
            return f"first in the output of {name}, by {gap:.2g}"
    return "after the last layer"


def _reason(model: nn.Module, ids: Tensor, mask: Tensor, prompt: int) -> str:
    """What is known of the cause: nothing, or that the plan of a replay does not reach the adapted attention."""
    reached = []
    layers = [module for module in model.modules() if hasattr(module, "pte_encoder")]
    handles = [
        layer.register_forward_pre_hook(lambda *call: reached.append("replay" in call[-1]), with_kwargs=True)
        for layer in layers
    ]
    _replay(model, ids, mask, prompt, WINDOW)
    for handle in handles:
        handle.remove()
    return "" if all(reached) else "; its layers hand no keyword arguments on to their attention, as a replay needs"


def _batch(vocabulary: int) -> tuple[Tensor, Tensor, int]:
    """Random tokens, (batch, prompt + completion), prompts padded on the left; their mask; the padded length."""
    prompt = max(PROMPTS)
    ids = torch.randint(3, vocabulary, (len(PROMPTS), prompt + THOUGHTS + 1))
    mask = torch.ones_like(ids)
    for row, length in enumerate(PROMPTS):
        ids[row, : prompt - length] = mask[row, : prompt - length] = 0
    return ids, mask, prompt


def _decode(model: nn.Module, ids: Tensor, mask: Tensor, prompt: int, window: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs (batch, completion, vocabulary) of a decode token by token, and outputs of all layers."""
    cache = BoundedCache(window, config=model.config)
    positions, logits, parts = (mask.cumsum(1) - 1).clamp(min=0), [], []
    for stop in range(prompt, ids.shape[1]):
        now = slice(0 if stop == prompt else stop - 1, stop)
        where = {"position_ids": positions[:, now], "past_key_values": cache, "use_cache": True}
        with _outputs(model) as outputs:
            logits.append(model(input_ids=ids[:, now], attention_mask=mask[:, :stop], **where).logits[:, -1:])
        parts.append(outputs)
    whole = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    return torch.cat(logits, dim=1).log_softmax(-1), whole


def _replay(model: nn.Module, ids: Tensor, mask: Tensor, prompt: int, window: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The same by a replay in one pass."""
    with _outputs(model) as outputs:
        logits = model(input_ids=ids, **replay_inputs(model, mask, prompt, Schedule(window))).logits
    return logits[:, prompt - 1 : -1].log_softmax(-1), outputs


@contextmanager
def _outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Outputs of the decoder layers by name, (batch, length, ...), in order, of the forward inside."""
    found: dict[str, Tensor] = {}

    def note(name: str):
        def hook(layer: nn.Module, inputs: tuple, output) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            # Gemma 3n has several streams: (streams, batch, length, d_model).
            found[name] = hidden.movedim(0, 2) if hidden.dim() == 4 else hidden

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    handles = [
        layer.register_forward_hook(note(f"layer {number} ({type(layer).__name__})"))
        for number, (_, layer) in enumerate(layers)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
