"""Segments of models with sliding and recurrent layers: exact against one pass, forward and backward."""

import gc

import pytest
import torch

from pte_trl.adapter.self_test import check_segments
from pte_trl.cache.schedule import Schedule
from pte_trl.replay import segment_run
from pte_trl.replay.segment_layers import Fed
from pte_trl.replay.segments import segment_logps
from tests.grids import grid
from tests.models import TEMPERATURE, chosen, gap, left_padded_batch, replay_logps, with_pte
from tests.test_gradients import assert_same
from tests.test_segments import Held
from tests.zoo import ZOO, tiny_of
from tests.zoo_views import widened

WINDOW, CUT = 6, 9  # E = 2; a segment is longer than W, than the sliding window (5) and than a recurrent chunk
IDS, MASK, PROMPT = left_padded_batch([7, 3], 27)
WEIGHTS = torch.randn(2, 27, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
# Sliding; sliding with a rotary of its own; recurrent; recurrent and attention in one layer; convolutions.
MODELS = ["cohere2", "gemma3_text", "qwen3_next", "falcon_h1", "lfm2"]
EXACT = 1e-9
ARMS = ("bare", "pte")


def model_of(name: str, arm: str, wide: bool = True):
    torch.manual_seed(0)
    model = tiny_of(ZOO[name]) if arm == "bare" else with_pte(tiny_of(ZOO[name]))
    if wide:
        widened(model)
    return model


def both(model, logps) -> tuple[torch.Tensor, dict]:
    """Log-probs and the gradients of all trainable tensors that have one."""
    model.zero_grad()
    found = logps()
    (found * WEIGHTS).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.norm() > 1e-6}
    return found.detach(), gradients


def one_pass(model, window=WINDOW, mask=MASK):
    return chosen(replay_logps(model, IDS, mask, PROMPT, window), IDS, PROMPT)


def segments(model, window=WINDOW, mask=MASK, **options):
    options = {"temperature": TEMPERATURE, "segment_length": CUT} | options
    return segment_logps(model, IDS, mask, PROMPT, Schedule(window), **options)[0]


@grid(name=MODELS, arm=ARMS)
def test_segments_equal_one_pass(name, arm):
    model = model_of(name, arm)
    expected, expected_gradients = both(model, lambda: one_pass(model))
    found, gradients = both(model, lambda: segments(model))
    assert gap(found, expected) <= EXACT
    assert gap(expected, one_pass(model, WINDOW + 1)) > 1e-2
    assert_same(gradients, expected_gradients, 1e-8)


@grid(length=[1, 3, 2 * WINDOW + 1, None], name=MODELS)
def test_however_it_is_cut(name, length):
    """Also by single tokens, for which recurrent layers have another step."""
    model = model_of(name, "bare")
    expected, expected_gradients = both(model, lambda: one_pass(model))
    found, gradients = both(model, lambda: segments(model, segment_length=length, offload=True))
    assert gap(found, expected) <= EXACT
    assert_same(gradients, expected_gradients, 1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_run_again_start_from_the_same_state(monkeypatch, name):
    monkeypatch.setattr(segment_run, "SMALL", 0)
    model = model_of(name, "bare", wide=False).train()  # what runs again runs outside of the model's forward
    expected, expected_gradients = both(model, lambda: segments(model))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found, gradients = both(model, lambda: segments(model))
    assert torch.equal(found, expected)
    assert_same(gradients, expected_gradients, 1e-10)


@pytest.mark.parametrize("name", ["cohere2", "qwen3_next"])
def test_a_finished_completion_is_as_in_one_pass(name):
    model, mask = model_of(name, "bare"), MASK.clone()
    mask[0, -9:] = 0
    found, expected = segments(model, mask=mask), one_pass(model, mask=mask) * mask[:, PROMPT:]
    assert gap(found, expected) <= EXACT


@pytest.mark.parametrize("name", ["cohere2", "qwen3_next"])
def test_memory_is_that_of_a_segment(name):
    """What autograd holds does not grow with the text; what lies between segments is one state each."""
    model = model_of(name, "bare")

    def held(length: int) -> int:
        ids, mask, prompt = left_padded_batch([7, 3], length)
        gc.collect()
        Held.now = Held.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda tensor: tensor.tensor):
            logps = segment_logps(model, ids, mask, prompt, Schedule(WINDOW), segment_length=CUT, temperature=1.0)[0]
            logps.sum().backward()
        return Held.most

    short, long = held(30), held(80)
    assert 0 < long <= 1.02 * short


@torch.no_grad()
def test_what_lies_between_segments():
    """Keys and values of a token once, of sliding layers too; of a recurrent layer one state for each segment."""
    run = segment_run.SegmentRun(model_of("qwen3_next", "bare"), IDS, MASK, PROMPT, Schedule(WINDOW), CUT, False, 1.0)
    run.forward()
    assert len(run.entered) == len(run.spans) == 4
    for entered in run.entered[1:]:
        names = [sorted({name.split(".")[0] for name in tensors}) for tensors in entered.tensors]
        assert names == [["conv_states", "recurrent_states"], [], ["conv_states", "recurrent_states"]]
        assert all(layer.keys is None for layer in entered.layers if isinstance(layer, Fed))
    run = segment_run.SegmentRun(model_of("cohere2", "bare"), IDS, MASK, PROMPT, Schedule(WINDOW), CUT, False, 1.0)
    run.forward()
    for kept, span in zip(run.past.kept, run.spans, strict=True):
        assert [keys.shape[2] for keys, _ in kept.values()] == 3 * [len(span)]


def test_a_model_that_forgets_its_state_is_refused():
    model = model_of("jamba", "bare")
    with pytest.raises(ValueError, match="'jamba' begin every forward of several tokens from an empty state"):
        segments(model)
    with pytest.raises(ValueError, match="empty state"):
        check_segments(model.config)
    for name in ("llama", "qwen3_next", "lfm2"):
        check_segments(model_of(name, "bare").config)
