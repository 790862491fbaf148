"""Calibration of a fresh adapter's encoders on the first prompts of the training set."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from statistics import fmean

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn

from pte_trl.adapter.calibration import fit, measure
from pte_trl.adapter.model import active_layers, pte_layers
from pte_trl.cache.policy import FULL_CACHE
from pte_trl.compat.trl import distributed_backend, tokenize_prompts
from pte_trl.rollouts.prompts import left_pad
from pte_trl.rollouts.rollout import rollout
from pte_trl.runtime.together import on_main


def is_fresh(trainer) -> bool:
    """Whether the trained adapter is PTE's and was never trained: its up-projections, which start at zero, still are.

    Calibrating such an adapter changes nothing of what the model computes. The same on every process.
    """
    layers = active_layers(trainer.model)
    if not layers:
        return False
    part = f".pte_up.{layers[0]._adapter()}."
    ups = [parameter for name, parameter in trainer.model.named_parameters() if part in name]
    with distributed_backend(trainer).gather_params(ups):
        return on_main(lambda: not any(parameter.any() for parameter in ups))


def calibrate_encoders(trainer, texts: int = 8) -> None:
    """Fits the encoders of a fresh PTE adapter to the base model's keys and values, and prints what it found.

    The first prompts of the training set serve; whitening and centring have more to find out, and get twice as many
    with what the base writes to them, since it is thoughts that are evicted. The main process measures, every process
    fits: the others may hold no weights yet.
    """
    layers, args, model = pte_layers(trainer.model), trainer.args, trainer.model
    if not layers:
        return
    config = layers[0].config[layers[0]._adapter()]
    whiten, more = config.whiten, config.whiten or config.centre
    rows = list(islice(trainer.train_dataset, 2 * texts if more else texts))
    found = [None]
    with distributed_backend(trainer).gather_params(list(model.parameters())):
        if trainer.accelerator.is_main_process:
            ids = tokenize_prompts(trainer, [row["prompt"] for row in rows])
            policy = args.cache_policy.at(0.5, 0.5)  # of ranges the medians
            evict = round(fmean(policy.schedule(len(prompt)).evict for prompt in ids))
            with placed(model, trainer.accelerator.device):
                if more:
                    ids = with_thoughts(trainer, ids)
                inputs = left_pad(ids, trainer.processing_class.pad_token_id, model.device)
                found = [measure(model, *inputs, evict, reach=trainer.max_completion_length if more else 0)]
    (found,) = broadcast_object_list(found)
    fit(model, found)
    ratios = [each.ratio for each in found]
    trainer.accelerator.print(
        f"encoders calibrated on {len(rows)} prompts: |S'|/|S| was {min(ratios):.3g} to {max(ratios):.3g} over "
        f"{len(ratios)} layers"
    )
    if whiten:
        widths = [each.dimensions for each in found]
        size = found[0].whiteners[0].shape[-1]
        trainer.accelerator.print(f"keys filled {min(widths):.1f} to {max(widths):.1f} of a head's {size} dimensions")


@contextmanager
def placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on `device`, for as long as this lasts.

    Under ZeRO-1/2 and FSDP transformers leaves a model on the CPU, with one thread, until the engine takes it: a
    forward would take minutes there, and the other processes wait.
    """
    home = model.device
    away = home.type == "cpu" and device.type != "cpu"
    if away:
        model.to(device)
    try:
        yield
    finally:
        if away:
            model.to(home)


def longest_prompt(trainer, rows: Dataset, batch: int = 1000) -> int:
    """Tokens of the longest prompt of a dataset, as the trainer tokenizes them."""
    prompts, longest = rows.select_columns("prompt"), 0
    for start in range(0, len(prompts), batch):
        ids = tokenize_prompts(trainer, list(prompts[start : start + batch]["prompt"]))
        longest = max(longest, *map(len, ids))
    return longest


def with_thoughts(trainer, prompt_ids: list[list[int]], tokens: int = 128) -> list[list[int]]:
    """The prompts, each with the first `tokens` that the model of a fresh adapter, that is, the base, writes to it."""
    tokens = min(tokens, trainer.max_completion_length)
    written = rollout(
        trainer.model,
        prompt_ids,
        FULL_CACHE,
        max_new_tokens=tokens,
        temperature=trainer.temperature,
        eos_token_ids=trainer.eos_token_ids,
        pad_token_id=trainer.processing_class.pad_token_id,
        seeds=list(range(len(prompt_ids))),
    )
    return [prompt + thought for prompt, thought in zip(prompt_ids, written.completion_ids, strict=True)]
