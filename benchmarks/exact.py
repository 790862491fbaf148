"""Is what a device computes right? Engine against reference, replay against decode, segments against one pass.

    python -m benchmarks.exact
    python -m benchmarks.exact --device cuda

Tiny random models of every family, with PTE, LoRA and bare. Prompts of different lengths are decoded on four rows that
are refilled, and by an engine that is kept while the number of completions changes. Every difference is the largest of
its cell and has a bound (`BOUNDS`); the exit status is 1 where one is exceeded or a cell fails.

    tokens      completions of the engine that are the reference implementation's; in float32 all must be
    engine      log-probs of engine and reference, up to the first token that differs
    replay      log-probs of the replay and of the decode
    segments    log-probs of segments and of one pass
    gradients   of every trainable tensor, segments over one pass: norm of the difference over the norm; likewise with
                keys and values on the CPU (offload)
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import finish, options, parse
from benchmarks.measure import is_cuda
from benchmarks.models import with_adapter
from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs
from pte_trl.replay.segments import segment_logps
from pte_trl.rollouts.batching import EngineCache
from pte_trl.rollouts.rollout import Rollout, rollout

VOCABULARY, TEMPERATURE, NEW, WINDOW = 256, 0.8, 48, 12
PROMPTS = [[5, 6, 7, 8, 9, 10, 11]] * 4 + [[10, 11]] * 3 + [[12, 13, 14]] * 2 + [[5, 6, 7, 8, 9, 10, 11]] * 2
ROWS, COUNTS = 4, (8, len(PROMPTS), 6, 8)  # rows of the kept engine, completions of one rollout after another
FAMILIES = ("qwen2", "llama", "qwen3", "mistral")
# (family, adapter, attention): every family, every adapter, all implementations of attention.
CELLS = [(family, "pte", "blockwise") for family in FAMILIES]
CELLS += [("llama", "lora", "blockwise"), ("qwen2", "pte sum", "blockwise"), ("llama", "bare", "blockwise")]
CELLS += [("qwen2", "pte", "sdpa"), ("qwen2", "pte", "blockwise_flex")]
# A CPU gives 2e-6 in float32 (gradients 9e-7) and 0.02 in bfloat16 (gradients 0.04). bfloat16 has eight bits, and
# engine, replay and segments add up in different orders.
BOUNDS = {
    "float32": {"engine": 1e-4, "replay": 1e-4, "segments": 1e-4, "gradients": 1e-3},
    "bfloat16": {"engine": 0.1, "replay": 0.1, "segments": 0.1, "gradients": 0.2},
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(BOUNDS), default=list(BOUNDS))
    parser.add_argument("--cells", type=int, default=len(CELLS), help="only the first so many of every dtype")
    parser.add_argument("--compile", action="store_true", help="the engine's decode steps are compiled")
    parser.add_argument("--seconds", type=float, default=600, help="begin no cell after these")
    return parse(parser, argv)


def tiny(family: str, adapter: str, attention: str, args: argparse.Namespace, dtype: str) -> nn.Module:
    """Three layers with weights at which a random net is not chaotic; drawn on the CPU, so alike on every device."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "intermediate_size": 96, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
    more = {"sliding_window": None} if family == "mistral" else {}
    config = AutoConfig.for_model(family, pad_token_id=0, bos_token_id=1, eos_token_id=None, **sizes, **more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.8, 1.2)
            else:
                parameter.normal_(std=1.0 if "embed_tokens" in name else 0.1)
    model = model.to(getattr(torch, dtype))
    model = model if adapter == "bare" else with_adapter(model, adapter, rank=8)
    return model.to(args.device)


def precision(args: argparse.Namespace, dtype: str) -> AbstractContextManager:
    """As the trainers do: adapters in float32 beside bfloat16 weights, under autocast."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def sampled(model: nn.Module, count: int, **how) -> Rollout:
    ends = {"eos_token_ids": list(range(40, 46)), "pad_token_id": 0, "seeds": list(range(count))}
    return rollout(
        model, PROMPTS[:count], CachePolicy(WINDOW), max_new_tokens=NEW, temperature=TEMPERATURE, **ends, **how
    )


def worse(one: float, other: float) -> float:
    """The larger one; a NaN is the worst."""
    return other if not other <= one else one


def against_reference(model: nn.Module, compile: str) -> tuple[dict, Rollout]:
    """The first two columns, and the rollout of all prompts."""
    expected, kept = sampled(model, len(PROMPTS), reference=True), EngineCache()
    same = every = 0
    most, whole = 0.0, None
    for count in COUNTS:
        found = sampled(model, count, batch_size=ROWS, engine_cache=kept, compile=compile)
        whole = found if count == len(PROMPTS) else whole
        for row in range(count):
            ours, theirs = found.completion_ids[row], expected.completion_ids[row]
            same, every = same + (ours == theirs), every + 1
            for mine, other, a, b in zip(ours, theirs, found.logprobs[row], expected.logprobs[row], strict=False):
                if mine != other:
                    break
                most = worse(most, abs(a - b))
    if not max(whole.evictions):
        raise RuntimeError("no completion was long enough for an eviction: nothing was tested")
    return {"tokens": f"{same}/{every}", "engine": most}, whole


def padded(found: Rollout, device: str) -> tuple[Tensor, Tensor, int, Tensor]:
    """Ids and mask, (batch, prompt + completion), prompts padded left and completions right; prompt; log-probs."""
    prompt, completion = max(map(len, PROMPTS)), max(map(len, found.completion_ids))
    shape = (len(PROMPTS), prompt + completion)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    logps = torch.zeros(len(PROMPTS), completion)
    for row, (before, after) in enumerate(zip(PROMPTS, found.completion_ids, strict=True)):
        span = slice(prompt - len(before), prompt + len(after))
        ids[row, span], mask[row, span] = torch.tensor(before + after), 1
        logps[row, : len(after)] = torch.tensor(found.logprobs[row])
    return ids.to(device), mask.to(device), prompt, logps.to(device)


def one_pass(model: nn.Module, ids: Tensor, mask: Tensor, prompt: int) -> Tensor:
    """(batch, completion) log-probs of the replay; 0 where padded."""
    extra = replay_inputs(model, mask, prompt, Schedule(WINDOW))
    logits = model(input_ids=ids, **{"use_cache": False, **extra}).logits[:, prompt - 1 : -1]
    logps = (logits.float() / TEMPERATURE).log_softmax(-1).gather(-1, ids[:, prompt:, None]).squeeze(-1)
    return logps.masked_fill(mask[:, prompt:] == 0, 0)


def with_gradients(model: nn.Module, logps: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The log-probs and every gradient, for weights of mixed sign, as advantages are."""
    model.zero_grad(set_to_none=True)
    found = logps()
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3)).to(found.device)
    (found * weights).sum().backward()
    grads = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return found.detach(), grads


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest ||a - b|| / ||b|| of any tensor; a gradient that only one has is infinitely far."""
    if found.keys() != expected.keys() or not found:
        return float("inf")
    floor = 1e-3 * max(b.norm() for b in expected.values())  # below it a gradient is rounding noise
    return max(float((found[name] - b).norm() / b.norm().clamp(min=floor)) for name, b in expected.items())


def measured(model: nn.Module, args: argparse.Namespace, dtype: str) -> dict:
    """The columns of one cell."""
    with precision(args, dtype):
        row, found = against_reference(model.eval(), "always" if args.compile else "never")
        ids, mask, prompt, decoded = padded(found, args.device)
        with torch.no_grad():
            row["replay"] = float((one_pass(model, ids, mask, prompt) - decoded).abs().max())
        expected, gradients = with_gradients(model, lambda: one_pass(model, ids, mask, prompt))
        row["segments"] = row["gradients"] = 0.0
        for offload in (False, True):
            how = {"offload": offload, "temperature": TEMPERATURE}
            logps, grads = with_gradients(
                model, lambda how=how: segment_logps(model, ids, mask, prompt, Schedule(WINDOW), **how)[0]
            )
            row["segments"] = worse(row["segments"], float((logps - expected).abs().max()))
            row["gradients"] = worse(row["gradients"], apart(grads, gradients))
    return row


def verdict(row: dict, dtype: str) -> str:
    """ "ok", or the columns that exceed their bounds; a NaN exceeds every bound."""
    over = [f"{key} > {bound:g}" for key, bound in BOUNDS[dtype].items() if not row[key] <= bound]
    same, every = row["tokens"].split("/")
    over += ["tokens differ"] if dtype == "float32" and same != every else []
    return ", ".join(over) or "ok"


def cell(which: tuple[str, str, str], args: argparse.Namespace, dtype: str) -> dict:
    family, adapter, attention = which
    row = {"family": family, "adapter": adapter, "attention": attention, "dtype": dtype}
    empty = dict.fromkeys(("tokens", *BOUNDS[dtype]), "-")
    began = time.perf_counter()
    try:
        found = measured(tiny(*which, args, dtype), args, dtype)
        row |= {key: f"{x:.1e}" if isinstance(x, float) else x for key, x in found.items()}
        row["result"] = verdict(found, dtype)
    except Exception as error:  # the other cells still say something
        traceback.print_exc(limit=-6, file=sys.stdout)
        row |= empty | {"result": f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]}
    return row | {"seconds": time.perf_counter() - began}


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if is_cuda(args.device):  # TF32 has ten bits: float32 would be compared with something else
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    began, rows, left = time.perf_counter(), [], []
    for dtype in args.dtypes:
        for which in CELLS[: args.cells]:
            if time.perf_counter() - began > args.seconds:
                left.append(f"{dtype} {' '.join(which)}")
                continue
            rows.append(cell(which, args, dtype))
            print("  ".join(f"{x:.1f}" if isinstance(x, float) else str(x) for x in rows[-1].values()), flush=True)
    finish("exact", args, rows)
    if left:
        print(f"not run, {args.seconds:g} seconds were over: {', '.join(left)}")
    if wrong := [row for row in rows if row["result"] != "ok"]:
        sys.exit(f"{len(wrong)} of {len(rows)} cells are not right, the first: {wrong[0]['result']}")


if __name__ == "__main__":
    main()
