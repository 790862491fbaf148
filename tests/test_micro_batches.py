"""Micro-batches of a rollout whose samples have several windows."""

import pytest
import torch

from pte_trl.cache.schedule import Schedule, packed
from pte_trl.training.micro_batches import by_window
from tests.test_settings import distill, grpo, logged


def rollout_of(windows: list[int], size: int) -> list[dict]:
    """Micro-batches of samples that are told apart by their number."""
    numbers = torch.arange(len(windows))
    schedules = packed([Schedule(window) for window in windows])
    whole = {"schedules": schedules, "ids": numbers.unsqueeze(1).expand(-1, 3), "texts": numbers.tolist()}
    parts = [slice(at, at + size) for at in range(0, len(windows), size)]
    rest = {"num_items_in_batch": torch.tensor(9), "pixel_values": None}
    return [{key: values[part] for key, values in whole.items()} | rest for part in parts]


def windows_of(batch: dict) -> list[int]:
    return batch["schedules"][:, 0].tolist()


def test_samples_of_one_window_come_together_and_none_is_lost():
    windows = [3, 8, 3, 5, 8, 8, 3, 5, 5, 8, 3, 5]
    found = by_window(rollout_of(windows, size=4))
    assert sorted(map(windows_of, found)) == [[3] * 4, [5] * 4, [8] * 4]
    for batch in found:
        assert batch["ids"][:, 0].tolist() == batch["texts"] and batch["ids"].shape == (4, 3)
        assert [windows[number] for number in batch["texts"]] == windows_of(batch)
        assert batch["num_items_in_batch"] == 9 and batch["pixel_values"] is None
    assert sorted(number for batch in found for number in batch["texts"]) == list(range(12))
    assert len({tuple(windows_of(b)[0] for b in by_window(rollout_of(windows, 4))) for _ in range(30)}) > 1


def test_with_one_window_they_are_as_trl_has_made_them():
    batches = rollout_of([7] * 6, size=2)
    assert by_window(batches) is batches


@pytest.mark.parametrize("make", [grpo, distill])
def test_a_training_scores_samples_of_one_window_together(tmp_path, monkeypatch, make):
    settings = {"window": "auto", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer, scored = make(tmp_path, "pte", **settings, **({"num_generations": 4} if make is grpo else {})), []
    compute_loss = trainer._compute_loss

    def watched(model, inputs, *args):
        scored.append(windows_of(inputs))
        return compute_loss(model, inputs, *args)

    monkeypatch.setattr(trainer, "_compute_loss", watched)
    trainer.train()
    assert len(scored) == 2 * 4 and len({window for batch in scored for window in batch}) > 1
    if make is grpo:  # two prompts a rollout, and two micro-batches of each
        assert all(len(set(batch)) == 1 for batch in scored)
        assert max(logged(trainer, "mismatch/max")) < 1e-4
    else:  # eight prompts, sorted by their length
        for step in (scored[:4], scored[4:]):
            assert [w for batch in sorted(step) for w in batch] == sorted(w for batch in step for w in batch)
