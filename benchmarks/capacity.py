"""The largest batch of long rollouts in a given memory: PTE's window over LoRA's full cache.

    python -m benchmarks.capacity --shape qwen2.5-3b
    python -m benchmarks.capacity --shape qwen2.5-3b --device cuda
    python -m benchmarks.capacity --shape qwen2.5-3b --device cuda --whole

On a GPU the batch is found by trying, with torch held to the given memory. A rollout makes its buffers at the start,
so a trial ends after some tokens: a twentieth of the vocabulary counts as the end. `--whole` then rolls the batch out
to its full length, and takes 5 % less until that succeeds.

On a CPU it is counted, not allocated: the bytes alive at a decode step of small batches, with one and two of the
shape's layers and two small cache lengths. They are a sum of four parts (per sample: fixed, per layer, per cached
token, per layer and cached token), solved for and extrapolated to the whole shape; `cache over formula` compares the
last part with `pte_trl.rollouts.batching.cache_bytes`.
"""

import argparse
import gc
import itertools

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import finish, options, parse
from benchmarks.measure import Peak, is_cuda
from benchmarks.models import SHAPES, random_model, shared_copy, with_adapter
from pte_trl.cache.policy import CachePolicy
from pte_trl.rollouts.batching import EngineCache, cache_bytes
from pte_trl.rollouts.rollout import rollout

STEPS = 4  # decode steps of a count
BATCHES, LAYERS, SMALL = (2, 6), (1, 2), (32, 64)  # of the counts; SMALL: tokens in the cache


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--memory", type=float, default=40, help="GB")
    parser.add_argument("--new-tokens", type=int, default=16_384)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--count-dtype", default="bfloat16", choices=("float32", "bfloat16"), help="on a CPU")
    parser.add_argument("--whole", action="store_true", help="on a GPU: confirm by a rollout of full length")
    return parse(parser, argv)


# ---- tried, on a GPU ----------------------------------------------------------------------------------------------


def fits(base, adapter: str, batch: int, window: int, args: argparse.Namespace, whole: bool = False) -> bool:
    """Whether a rollout of so many samples finds room; for the parent, all that it allocated is free again."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        # A model of its own: buffers that a rollout keeps with its model go with it.
        model = with_adapter(shared_copy(base), adapter).eval()
        ends = [-1] if whole else list(range(0, base.config.vocab_size, 20))
        prompts = [list(range(1, args.prompt + 1))] * batch
        knobs = {"max_new_tokens": args.new_tokens, "eos_token_ids": ends, "pad_token_id": 0}
        rollout(model, prompts, CachePolicy(window), engine_cache=(kept := EngineCache()), **knobs)
    except torch.OutOfMemoryError:
        return False
    return kept.engine.cache.rows == batch  # fewer where the rollout has helped itself


def largest(fit, start: int = 1) -> int:
    """The largest batch for which `fit` holds, to 2 %; 0 if there is none. It is taken to be monotone."""
    if not fit(start):
        return 0
    low, high = start, 2 * start
    while fit(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low


def tried(args: argparse.Namespace) -> list[dict]:
    total = torch.cuda.get_device_properties(args.device).total_memory
    if args.memory * 1e9 > total:
        raise ValueError(f"--memory {args.memory}: the GPU has {total / 1e9:.1f} GB")
    torch.cuda.set_per_process_memory_fraction(args.memory * 1e9 / total, args.device)
    base = random_model(args.shape, seed=0, device=args.device, dtype=getattr(torch, args.dtype))
    rows = []
    for adapter, window in windows(args).items():
        found = largest(lambda batch, a=adapter, w=window: fits(base, a, batch, w, args))
        while args.whole and found and not fits(base, adapter, found, window, args, whole=True):
            found = min(found - 1, int(0.95 * found))
        how = "rolled out in full" if args.whole else "tried, the first tokens"
        rows.append({"arm": adapter, "cached": args.prompt + window, "batch": found, "how": how})
    return rows


# ---- counted, on a CPU --------------------------------------------------------------------------------------------


def decode_bytes(adapter: str, layers: int, cached: int, batch: int, args: argparse.Namespace) -> int:
    """Most bytes alive, beyond the weights, from the first decode step on; `cached` tokens have a place."""
    dtype = getattr(torch, args.count_dtype)
    base = random_model(args.shape, seed=0, dtype=dtype, num_hidden_layers=layers)
    model, window = with_adapter(base, adapter).eval(), cached // 2
    prompts, peak = [list(range(1, cached - window + 1))] * batch, Peak()

    def prefill_is_over(module, inputs) -> None:
        if inputs[0].shape[1] == 1:
            handle.remove()
            peak.most = peak.now

    handle = model.get_input_embeddings().register_forward_pre_hook(prefill_is_over)
    # PTE's window is full before the last steps, so that its evictions are in the count.
    length = window + STEPS if adapter == "pte" else window
    with peak:
        rollout(model, prompts, CachePolicy(window), max_new_tokens=length, eos_token_ids=[-1], pad_token_id=0)
    return peak.most


def per_sample(adapter: str, args: argparse.Namespace) -> dict[tuple[int, int], float]:
    """(layers, cached tokens) -> bytes that one more sample needs."""
    few, many = BATCHES
    return {
        (layers, cached): (
            decode_bytes(adapter, layers, cached, many, args) - decode_bytes(adapter, layers, cached, few, args)
        )
        / (many - few)
        for layers, cached in itertools.product(LAYERS, SMALL)
    }


def extrapolated(found: dict[tuple[int, int], float], layers: int, cached: int) -> tuple[float, float]:
    """(bytes of a sample with so many layers and cached tokens, bytes per layer and token): bilinear in both."""
    (low, high), (short, long) = LAYERS, SMALL

    def at(layer_count: int) -> float:
        """Linear in the cached tokens."""
        slope = (found[layer_count, long] - found[layer_count, short]) / (long - short)
        return found[layer_count, short] + slope * (cached - short)

    per_layer = (at(high) - at(low)) / (high - low)
    both = found[high, long] - found[high, short] - found[low, long] + found[low, short]
    return at(low) + per_layer * (layers - low), both / (high - low) / (long - short)


def weight_bytes(args: argparse.Namespace) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(SHAPES[args.shape]))
    return sum(p.numel() for p in model.parameters()) * getattr(torch, args.count_dtype).itemsize


def counted(args: argparse.Namespace) -> list[dict]:
    config, weights, rows = AutoConfig.from_pretrained(SHAPES[args.shape]), weight_bytes(args), []
    formula = cache_bytes(config, 1, getattr(torch, args.count_dtype)) / config.num_hidden_layers
    for adapter, window in windows(args).items():
        cached = args.prompt + window
        sample, slope = extrapolated(per_sample(adapter, args), config.num_hidden_layers, cached)
        rows.append(
            {
                "arm": adapter,
                "cached": cached,
                "weights GB": weights / 1e9,
                "MB per sample": sample / 1e6,
                "cache over formula": slope / formula,
                "batch": max(0, int((args.memory * 1e9 - weights) / sample)),
                "how": "counted, not allocated",
            }
        )
    return rows


def windows(args: argparse.Namespace) -> dict[str, int]:
    """Adapter -> thought tokens that its cache keeps."""
    return {"pte": args.window, "lora": args.new_tokens}


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    rows = tried(args) if is_cuda(args.device) else counted(args)
    base = rows[-1]["batch"]
    finish("capacity", args, [row | {"over lora": row["batch"] / base if base else "-"} for row in rows])


if __name__ == "__main__":
    main()
