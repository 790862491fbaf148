"""Rollouts in parts: the same completions, and no end to a run because memory was short once."""

import pytest
import torch

from pte_trl import batching
from pte_trl.batching import auto_batch_size, cache_bytes, rollout_in_parts
from pte_trl.rollout import rollout
from tests.models import tiny, with_pte

PROMPTS = [[5, 6, 7, 8, 9]] * 3 + [[10, 11]] * 2 + [[12, 13, 14]] * 2
OPTIONS = {"max_new_tokens": 20, "eos_token_ids": [40, 41], "pad_token_id": 0, "seeds": list(range(7))}


def parts(model, size, **changes):
    return rollout_in_parts(model, PROMPTS, size, window=6, **OPTIONS | changes)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, None, "auto"])
def test_any_size_gives_the_same_completions(size):
    model = with_pte(tiny("llama", torch.float64))
    found, expected = parts(model, size), rollout(model, PROMPTS, window=6, **OPTIONS)
    assert found.completion_ids == expected.completion_ids
    assert found.evictions == expected.evictions
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_short_memory_halves_the_part_and_loses_nothing(monkeypatch, capsys):
    model, tried = with_pte(tiny("llama", torch.float64)), []

    def short(model, prompts, **options):
        tried.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("as on a full GPU")
        return rollout(model, prompts, **options)

    monkeypatch.setattr(batching, "rollout", short)
    assert parts(model, 6).completion_ids == rollout(model, PROMPTS, window=6, **OPTIONS).completion_ids
    assert tried == [6, 3, 2, 2, 2, 1]
    assert "out of memory, going on with 2 samples" in capsys.readouterr().out


def test_a_single_sample_that_does_not_fit_is_an_error(monkeypatch):
    def never(*args, **options):
        raise torch.OutOfMemoryError("as on a full GPU")

    monkeypatch.setattr(batching, "rollout", never)
    with pytest.raises(torch.OutOfMemoryError):
        parts(tiny("llama"), 4)


def test_the_size_follows_from_the_memory_that_is_free():
    model = tiny("llama", torch.float32)
    held = rollout(
        model, [[1, 2, 3]], window=6, **OPTIONS | {"seeds": [0], "eos_token_ids": [-1], "max_new_tokens": 8}
    )
    one = cache_bytes(model.config, 3 + 6, model.dtype)
    assert one == held.cache_bytes  # the whole window is allocated
    assert auto_batch_size(model, 9, free=10 * one) == 6
    assert auto_batch_size(model, 9, free=0) == 1
    assert auto_batch_size(model, 9) is None  # a CPU
