"""Rollout speed: the bounded rollouts and the full cache, ours, transformers' and vLLM's.

    python -m benchmarks.rollout
    python -m benchmarks.rollout --shape smollm2-135m --batch 16 --new-tokens 2048 --arms pte lora_c generate
    python -m benchmarks.rollout --shape qwen2.5-3b --batch 64 --new-tokens 3072 --window 512 --device cuda

Every arm samples at temperature 1 from the same random weights; nothing ends a completion early. An arm that cannot
run here is left out, and its reason printed. Ratios of speed are medians over the turns. `of roofline` (on a GPU, or
with --roofline) is the time that a copy of this machine would need for the bytes of weights and cache that a step has
to read, over the time that the step took.
"""

import argparse
import logging
import os
import statistics
from collections.abc import Callable
from importlib.util import find_spec

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.common import finish, options, parse
from benchmarks.measure import copy_bandwidth, is_cuda, ratio, take_turns
from benchmarks.models import ENCODERS, SHAPES, random_model, shared_copy, with_adapter
from pte_trl.cache.policy import FULL_CACHE, CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.rollouts.batching import EngineCache, cache_bytes
from pte_trl.rollouts.rollout import rollout

PAGE = 256  # tokens of a page of the paged cache
Run = Callable[[int], int]  # one rollout of the whole batch, of so many new tokens; returns how many it sampled


class Skipped(Exception):
    """Why an arm cannot run here."""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=USUAL)
    parser.add_argument("--roofline", action="store_true", help="its column on a CPU too")
    parser.add_argument("--vllm-memory", type=float, default=0.5, help="share of the GPU's memory that vLLM takes")
    return parse(parser, argv)


def ours(adapter: str, full_cache: bool = False, compile: str = "never"):
    def arm(base: PreTrainedModel, prompts: list[list[int]], args: argparse.Namespace) -> Run:
        model = with_adapter(shared_copy(base), adapter).eval()
        # Kept from call to call, as a trainer does: buffers and captured graphs are part of the warm-up.
        knobs = {"eos_token_ids": [-1], "pad_token_id": 0, "engine_cache": EngineCache(), "compile": compile}
        policy = FULL_CACHE if full_cache else CachePolicy(args.window)
        return lambda new: sum(map(len, rollout(model, prompts, policy, max_new_tokens=new, **knobs).completion_ids))

    return arm


def generate(adapter: str | None):
    """transformers' `generate`, with stock attention and its growing cache."""

    def arm(base: PreTrainedModel, prompts: list[list[int]], args: argparse.Namespace) -> Run:
        model = shared_copy(base, "sdpa")
        model.generation_config = sampling(args)
        model = (with_adapter(model, adapter) if adapter else model).eval()
        ids = torch.tensor(prompts, device=args.device)

        def run(new: int) -> int:
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
            return out[:, ids.shape[1] :].numel()

        return torch.no_grad()(run)

    return arm


def sampling(args: argparse.Namespace, **more) -> GenerationConfig:
    return GenerationConfig(do_sample=True, top_k=0, max_new_tokens=args.new_tokens, pad_token_id=0, **more)


def continuous(base: PreTrainedModel, prompts: list[list[int]], args: argparse.Namespace) -> Run:
    """transformers' `generate_batch`; it takes flash attention by itself where that is installed."""
    model = shared_copy(base, "sdpa").eval()
    config = ContinuousBatchingConfig(
        block_size=PAGE,
        num_blocks=args.batch * (1 + (args.prompt + args.new_tokens) // PAGE),  # or it takes most of the memory
        max_batch_tokens=None if is_cuda(args.device) else max(PAGE, args.batch, args.prompt),
    )

    knobs = {"generation_config": sampling(args, eos_token_id=-1), "continuous_batching_config": config}
    knobs |= {"persistent_manager": True, "progress_bar": False}  # kept from call to call, too

    def run(new: int) -> int:
        found = model.generate_batch(prompts, max_new_tokens=new, **knobs)
        return sum(len(output.generated_tokens) for output in found.values())

    return run


def vllm(base: PreTrainedModel, prompts: list[list[int]], args: argparse.Namespace) -> Run:
    if find_spec("vllm") is None:
        raise Skipped("not installed here; pip install 'pte_trl[vllm]', or on a CPU vLLM's build for it")
    if not is_cuda(args.device):
        # In this process, which --clock cpu counts; and no server thread takes a core from the workers.
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(SHAPES[args.shape]),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=args.dtype,
        max_model_len=args.prompt + args.new_tokens,
        max_num_seqs=args.batch,
        gpu_memory_utilization=args.vllm_memory,
        enforce_eager=not is_cuda(args.device),  # on a CPU compiled steps were no faster, after minutes of compiling
    )

    def run(new: int) -> int:
        knobs = SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        return sum(len(found.outputs[0].token_ids) for found in engine.generate(requests, knobs, use_tqdm=False))

    return run


ARMS = {
    "pte": ours("pte"),
    "pte compiled": ours("pte", compile="always"),
    "lora_c": ours("lora"),
    "lora_c compiled": ours("lora", compile="always"),
    "lora": ours("lora", full_cache=True),
    "generate": generate(None),
    "generate lora": generate("lora"),
    "continuous": continuous,
    "vllm": vllm,
}
USUAL = list(ARMS)
BESIDE = ("pte", "lora_c", "lora", "generate", "vllm")  # columns of ratios
ARMS |= {f"pte {name}": ours(f"pte {name}") for name in ENCODERS}  # run if named


def ready(args: argparse.Namespace, base: PreTrainedModel, prompts: list[list[int]]) -> dict[str, Run]:
    """The arms that run here, each warmed up: on a GPU by a whole rollout, where graphs may have to be captured."""
    warm, runs = args.new_tokens if is_cuda(args.device) else min(16, args.new_tokens), {}
    # vLLM first: it asks for its share of the memory before others have theirs.
    for name in sorted(args.arms, key=lambda name: (name != "vllm", list(ARMS).index(name))):
        try:
            run = ARMS[name](base, prompts, args)
            sampled = run(warm)
        except Exception as reason:
            # What is ours has to run. Of others' engines it depends on the machine, and how they fail is theirs.
            if name not in ("continuous", "vllm"):
                raise
            print(f"{name}: skipped, {reason}" if isinstance(reason, Skipped) else f"{name}: skipped, {reason!r}")
            continue
        if sampled != args.batch * warm:
            raise RuntimeError(f"{name}: {sampled} tokens instead of {args.batch} x {warm}")
        runs[name] = run
    return {name: runs[name] for name in ARMS if name in runs}


def bytes_read(base: PreTrainedModel, window: int | None, args: argparse.Namespace) -> float:
    """Weights and keys and values that a decode step has to read, on average over the rollout."""
    weights = {id(p): p.nbytes for p in base.parameters()}
    if not base.config.tie_word_embeddings:
        del weights[id(base.get_input_embeddings().weight)]  # a few rows of it are read
    thought = torch.arange(args.new_tokens)
    oldest = Schedule(window).first_visible(thought) if window else 0
    kept = args.prompt + (thought - oldest + 1).float().mean().item()
    return sum(weights.values()) + args.batch * kept * cache_bytes(base.config, 1, base.dtype)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    transformers_logging.set_verbosity_error()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    base = random_model(args.shape, seed=0, device=args.device, dtype=getattr(torch, args.dtype)).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 500, (args.batch, args.prompt), generator=generator).tolist()
    runs = ready(args, base, prompts)
    jobs = {name: lambda run=run: run(args.new_tokens) for name, run in runs.items()}
    times = take_turns(jobs, args.turns, args.device, args.clock, warm_up=False)
    bandwidth = copy_bandwidth(args.device, args.clock) if args.roofline or is_cuda(args.device) else None
    rows = []
    for name, mine in times.items():
        step = statistics.median(mine) / args.new_tokens
        row = {"arm": name, "tokens/s": round(args.batch / step), "step ms": 1e3 * step}
        row |= {f"over {x}": ratio(times[x], mine) for x in BESIDE if x in times}
        if bandwidth:
            read = bytes_read(base, args.window if name.startswith(("pte", "lora_c")) else None, args)
            row |= {"GB read": read / 1e9, "of roofline": read / bandwidth / step}
        rows.append(row)
    if bandwidth:
        print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    finish("rollout", args, rows)


if __name__ == "__main__":
    main()
