"""One rank of tests/test_layer_types_sharded.py: the micro-batches of tests/lockstep_probe.py in one pass each.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python tests/layer_types_probe.py zero3|fsdp2 FOLDER CASE

CASE is a family, with "+reentrant" for gradient checkpointing of that form.

Writes FOLDER/rank0.pt: log-probs of both micro-batches, and gradients. One of a rank's micro-batches has no eviction
while the other rank has several: a layer with PTE then asks its attention for keys and values on one rank alone.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from pte_trl.replay.plan import replay_inputs
from tests.layer_type_models import mixed
from tests.lockstep_probe import SAMPLES, loss_of, sharded
from tests.models import chosen, left_padded_batch, log_probs, schedules_of, with_pte


def model(case: str) -> nn.Module:
    """With PTE on q and o of every layer that attends in full, and checkpointed layers."""
    family, _, form = case.partition("+")
    found = with_pte(mixed(family, torch.float32), target_modules=["q_proj", "o_proj"]).train()
    found.gradient_checkpointing_enable({"use_reentrant": form == "reentrant"})
    found.enable_input_require_grads()
    return found


def logps_of(called: nn.Module, bare: nn.Module, rank: int, number: int) -> torch.Tensor:
    """(batch, completion) log-probs of a rank's micro-batch, by a call of `called`, which is `bare` or around it."""
    prompts, completion, windows = SAMPLES[rank][number]
    ids, mask, prompt = left_padded_batch(prompts, completion, seed=10 * rank + number)
    inputs = replay_inputs(bare, mask, prompt, schedules_of(torch.tensor(windows)))
    return chosen(log_probs(called(input_ids=ids, **inputs).logits[:, prompt - 1 : -1]), ids, prompt)


def main(engine: str, folder: str, case: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, bare = dist.get_rank(), model(case)
    wrapper, backward, gradient = sharded(bare, engine)
    found = {"logps": []}
    for number in range(len(SAMPLES[rank])):
        with torch.no_grad():
            logps_of(wrapper, bare, rank, number)  # a scoring without gradients, as old log-probs are
        logps = logps_of(wrapper, bare, rank, number)
        found["logps"].append(logps.detach())
        backward(loss_of(logps), bool(number))
    found["gradients"] = {name: gradient(p).clone() for name, p in bare.named_parameters() if p.requires_grad}
    torch.save(found, Path(folder, f"rank{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    main(*sys.argv[1:])
