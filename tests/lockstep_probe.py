"""One rank of tests/test_lockstep.py: two micro-batches of `SAMPLES` through `segment_logps` under a sharding engine.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python tests/lockstep_probe.py zero3|fsdp2 FOLDER

Writes FOLDER/rank0.pt: log-probs of both micro-batches, gradients, and how many layers were gathered at once inside
backward.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pte_trl.replay.segments import segment_logps
from pte_trl.runtime.lockstep import lockstep_of
from pte_trl.runtime.sharding import call_inside, gather_by_layer
from tests.models import ATTENTION, TEMPERATURE, left_padded_batch, schedules_of, tiny, with_pte

# Of both ranks, two micro-batches: prompts, completion, windows. Numbers of schedules and of segments differ.
SAMPLES = [
    [([6, 3], 21, [4, 9]), ([5], 2, [3])],
    [([4, 4], 3, [9, 9]), ([2], 17, [6])],
]
LAYERS = 4


def model(checkpointed: bool) -> nn.Module:
    """With adapted keys and values; where layers are checkpointed without, so that segments are longer than W."""
    torch.manual_seed(0)
    targets = ["q_proj", "o_proj"] if checkpointed else ATTENTION
    return with_pte(tiny("llama", torch.float32, num_hidden_layers=LAYERS), target_modules=targets).train()


def loss_of(logps: Tensor) -> Tensor:
    """With weights of mixed sign, as advantages are."""
    return (logps * torch.linspace(-1, 1.5, logps.numel()).view_as(logps)).sum()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    return model.base_model.model.model.layers


class Gathered:
    """The most layers whose weights are whole when one is entered inside backward."""

    def __init__(self, model: nn.Module):
        self.modules, self.most = [layer.mlp.up_proj for layer in decoder_layers(model)], 0
        # FSDP2 swaps parameters, ZeRO-3 their contents; where it finds one read that is not whole, it gathers it.
        self.kept = [module.weight for module in self.modules]
        for layer in decoder_layers(model):
            layer.register_forward_pre_hook(self.count)

    def count(self, *_) -> None:
        if torch._C._current_graph_task_id() != -1:
            self.most = max(self.most, sum(map(self.whole, self.modules, self.kept)))

    @staticmethod
    def whole(module: nn.Module, kept: nn.Parameter) -> bool:
        return kept.numel() > 0 if hasattr(kept, "ds_tensor") else not isinstance(module.weight, DTensor)


def sharded(model: nn.Module, engine: str):
    """The wrapper, backward of a micro-batch (loss, whether it is the last), and name -> whole gradient."""
    if engine == "fsdp2":
        for layer in decoder_layers(model):
            fully_shard(layer)
        fully_shard(model)

        def backward(loss: Tensor, last: bool) -> None:
            model.set_requires_gradient_sync(last)
            loss.backward()

        return model, backward, lambda p: p.grad.full_tensor()
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for two minutes
    gather_by_layer(model)
    nothing_kept = dict.fromkeys(("param_persistence_threshold", "prefetch_bucket_size", "max_reuse_distance"), 0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3} | {f"stage3_{name}": value for name, value in nothing_kept.items()},
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=torch.optim.SGD(trained, lr=1.0))

    def backward(loss: Tensor, last: bool) -> None:
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(2 * loss)  # the engine takes the mean of the micro-batches
        if not last:
            engine.step()

    return engine, backward, safe_get_full_grad


def main(engine: str, folder: str, *options: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, bare = dist.get_rank(), model(bool(options))
    if options:
        bare.gradient_checkpointing_enable({"use_reentrant": False})
        bare.enable_input_require_grads()
    wrapper, backward, gradient = sharded(bare, engine)
    gathered, found = Gathered(bare), {"logps": []}
    for last, (prompts, completion, windows) in enumerate(SAMPLES[rank]):
        ids, mask, prompt = left_padded_batch(prompts, completion, seed=10 * rank + last)
        schedules = schedules_of(torch.tensor(windows))

        def segments(input_ids: Tensor, attention_mask: Tensor, prompt=prompt, schedules=schedules):
            more = {"temperature": TEMPERATURE, "lockstep": lockstep_of(wrapper), "segment_length": 10}
            return segment_logps(bare, input_ids, attention_mask, prompt, schedules, **more)

        with torch.no_grad():
            segments(ids, mask)  # a scoring without gradients, as old log-probs are
        logps, _ = call_inside(wrapper, bare, segments, input_ids=ids, attention_mask=mask)
        found["logps"].append(logps.detach())
        backward(loss_of(logps), bool(last))
    found["gradients"] = {n: gradient(p).clone() for n, p in bare.named_parameters() if p.requires_grad}
    torch.save(found | {"gathered": gathered.most}, Path(folder, f"rank{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    main(*sys.argv[1:])
