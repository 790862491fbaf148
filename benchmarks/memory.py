"""Memory and time of a training step over the completion's length: one pass, segments, and LoRA with the full cache.

    python -m benchmarks.memory
    python -m benchmarks.memory --shape smollm2-135m --lengths 512 1024 2048 --device cuda

Every arm has gradient checkpointing (the segments run everything twice instead) and TRL's fused LM head. Memory is the
most that was alive at once beyond weights and their gradients: counted tensor by tensor on a CPU, by torch on a GPU.
Random weights; forward and backward of one sample.
"""

import argparse
import gc
import time
import weakref
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.trainer.utils import add_fused_lm_head

from benchmarks.common import environment, print_environment, print_table, random_model, record
from pte_trl import PteConfig, replay_inputs
from pte_trl.segments import segment_logps

TARGETS = ["q_proj", "o_proj"]


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors made inside and alive, and keeps the most: on a CPU nobody else does."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--offload", action="store_true", help="segments: past keys and values on the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--record", action="store_true", help="append to docs/benchmarks/memory.json")
    return parser.parse_args(argv)


def model_for(config, args: argparse.Namespace) -> torch.nn.Module:
    base = random_model(args.shape, seed=0, device=args.device, dtype=getattr(torch, args.dtype))
    add_fused_lm_head(base, outputs=("log_probs", "entropy"))
    base.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(base, config).train()
    for name, parameter in model.named_parameters():
        if "pte_up" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def arms(args: argparse.Namespace) -> dict[str, Callable[[torch.Tensor], None]]:
    """What one step of each arm does with token ids (1, prompt + completion)."""
    pte = model_for(PteConfig(target_modules=TARGETS), args)
    lora = model_for(LoraConfig(r=32, target_modules=TARGETS, task_type="CAUSAL_LM"), args)

    def one_forward(model, replayed: bool) -> Callable[[torch.Tensor], None]:
        def step(ids: torch.Tensor) -> None:
            labels, mask = ids.clone(), torch.ones_like(ids)
            labels[:, : args.prompt] = -100
            extra = replay_inputs(model, mask, args.prompt, args.window) if replayed else {"attention_mask": mask}
            out = model(input_ids=ids, labels=labels, fused_lm_head=True, **{"use_cache": False, **extra})
            out.log_probs.sum().backward()

        return step

    def segments(ids: torch.Tensor) -> None:
        options = {"offload": args.offload}
        segment_logps(pte, ids, torch.ones_like(ids), args.prompt, args.window, **options)[0].sum().backward()

    return {
        "lora, full cache": one_forward(lora, False),
        "pte, one pass": one_forward(pte, True),
        "pte, segments": segments,
    }


def measure(step: Callable[[torch.Tensor], None], ids: torch.Tensor) -> tuple[int, float]:
    """(most bytes alive, seconds) of one step."""
    gc.collect()
    if ids.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        step(ids)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, time.perf_counter() - began
    began = time.process_time()
    step(ids)
    seconds = time.process_time() - began
    with Peak() as peak:
        step(ids)
    return peak.most, seconds


def main() -> None:
    args = parse()
    about = environment(args.device)
    print_environment(about)
    steps, rows = arms(args), []
    vocabulary = 500
    for length in args.lengths:
        ids = torch.randint(1, vocabulary, (1, args.prompt + length), device=args.device)
        for step in steps.values():
            step(ids)  # gradients are there from now on, in every arm
        measured = {name: measure(step, ids) for name, step in steps.items()}
        base = measured["lora, full cache"]
        for name, (held, seconds) in measured.items():
            row = {"completion": length, "arm": name, "peak MB": round(held / 1e6, 1)}
            rows.append(row | {"memory over lora": held / base[0], "time over lora": seconds / base[1]})
    print_table(rows)
    if args.record:
        print(record("memory", about, vars(args), rows))


if __name__ == "__main__":
    main()
