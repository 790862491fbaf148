"""The third view: fed segment by segment, it gives the replay's log-probs and gradients, in bounded memory."""

import gc
import itertools

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.trainer.utils import add_fused_lm_head

from pte_trl.cache.schedule import Schedule
from pte_trl.replay import segment_run
from pte_trl.replay.segments import segment_logps
from tests.grids import grid
from tests.models import (
    ATTENTION,
    TEMPERATURE,
    chosen,
    decode_logps,
    gap,
    left_padded_batch,
    replay_logps,
    schedules_of,
    tiny,
    with_lora,
    with_pte,
)
from tests.test_gradients import VARIANTS, assert_same

WINDOW = 6  # E = 2
CUT = 9  # tokens of a segment: some leave within it
# Shorter than E, W, more than twice W and no multiple of E, all of the text.
LENGTHS = [1, WINDOW, 2 * WINDOW + 1, None]
IDS, MASK, PROMPT = left_padded_batch([6, 3], 27)
# weights of mixed sign, as advantages are: a plain sum would hide errors that cancel
WEIGHTS = torch.randn(2, 27, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def segments(model, window=WINDOW, **options):
    options = {"temperature": TEMPERATURE, "segment_length": CUT} | options
    return segment_logps(model, IDS, MASK, PROMPT, schedules_of(window), **options)[0]


def replayed(model, window=WINDOW, view=replay_logps):
    return chosen(view(model, IDS, MASK, PROMPT, window), IDS, PROMPT)


def both(model, logps) -> tuple[torch.Tensor, dict]:
    """Log-probs and the gradients of all trainable tensors."""
    model.zero_grad()
    found = logps()
    (found * WEIGHTS).sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@grid(variant=VARIANTS, family=["qwen2", "llama"], length=LENGTHS)
def test_segments_equal_the_replay_and_the_decode(family, variant, length):
    model = with_pte(tiny(family, wide_norms=True), **VARIANTS[variant])
    found, gradients = both(model, lambda: segments(model, segment_length=length))
    for view in (replay_logps, decode_logps):
        expected, expected_gradients = both(model, lambda view=view: replayed(model, view=view))
        assert gap(found, expected) <= 1e-9
        assert_same(gradients, expected_gradients, 1e-8)


@pytest.mark.parametrize("small", [0, segment_run.SMALL])
@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_run_again_in_backward_where_the_model_has_checkpointing(monkeypatch, variant, small):
    monkeypatch.setattr(segment_run, "SMALL", small)  # tokens up to which a segment's layers do not
    model = with_pte(tiny("llama", wide_norms=True), **VARIANTS[variant]).train()
    expected, expected_gradients = both(model, lambda: segments(model))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    runs = []
    handles = [layer.self_attn.register_forward_hook(lambda *_: runs.append(1)) for layer in layers]
    found, gradients = both(model, lambda: segments(model))
    for handle in handles:
        handle.remove()
    assert torch.equal(found, expected)
    assert_same(gradients, expected_gradients, 1e-12)
    evicts_own = not segment_run.keys_follow_state(model)
    assert evicts_own == (not {"k_proj", "v_proj"} & set(VARIANTS[variant]["target_modules"]))
    count = len(segment_run.spans_of(Schedule(WINDOW), PROMPT, IDS.shape[1] - PROMPT - 1, CUT, evicts_own))
    # Forward; again to have a graph; again inside each layer, except in small segments, which all of these are.
    assert len(runs) == (2 if small else 3) * count * len(layers) > 0
    assert all(layer.gradient_checkpointing and "forward" not in vars(layer) for layer in layers)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.3, 1.0])
@pytest.mark.parametrize("evicts_own", [True, False])
def test_a_segment_is_as_long_as_it_may_be(ratio, evicts_own):
    """Every token once, in order; where that is asked for, nothing of a segment is evicted within it."""
    for window, prompt, thoughts, longest in itertools.product(
        (1, 5, 8, 600), (1, 3), (0, 1, 30, 1400), (None, 3, 99)
    ):
        schedule = Schedule(window, ratio)
        spans = segment_run.spans_of(schedule, prompt, thoughts, longest, evicts_own)
        assert [i for span in spans for i in span] == list(range(-prompt, thoughts))
        most = longest or max(window, segment_run.LONGEST)
        for span in spans[1:]:
            assert 0 < len(span) <= most
            if evicts_own:
                assert len(span) == most or span.stop == thoughts
            else:
                assert schedule.first_visible(span[-1]) <= span.start
                assert len(span) == most or span.stop == thoughts or schedule.first_visible(span.stop) > span.start


def test_segments_over_several_evictions_with_adapted_keys_and_values():
    """W = 9, E = 3: three evictions a segment, and last a run of less than E tokens."""
    model = with_pte(tiny("qwen3", wide_norms=True), target_modules=ATTENTION)
    assert list(map(len, segment_run.spans_of(Schedule(9), PROMPT, 26, evicts_own=False))) == [PROMPT, 9, 9, 8]
    expected, expected_gradients = both(model, lambda: replayed(model, 9))
    for length in (None, 7):
        found, gradients = both(model, lambda length=length: segments(model, 9, segment_length=length))
        assert gap(found, expected) <= 1e-9
        assert_same(gradients, expected_gradients, 1e-8)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "blockwise"])
def test_every_attention_that_takes_a_mask(attention):
    model = with_pte(tiny("llama"))
    expected = replayed(model)
    model.set_attn_implementation(attention)
    assert gap(segments(model), expected) <= (1e-5 if attention == "eager" else 1e-9)  # its softmax is in float32


def test_an_attention_that_takes_no_mask_is_refused():
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2': a replay needs an arbitrary"):
        segments(model)


@pytest.mark.parametrize(
    "model",
    [
        lambda: with_lora(tiny("qwen2")),
        lambda: with_pte(tiny("qwen2")).train(),
        lambda: with_pte(tiny("qwen2"), use_global_tokens=False),
    ],
    ids=["lora", "pte", "without global tokens"],
)
@pytest.mark.parametrize("options", [*({"segment_length": n} for n in LENGTHS), {"offload": True}], ids=str)
def test_however_it_is_cut_and_wherever_it_is_kept(model, options):
    model = model()
    expected, expected_gradients = both(model, lambda: replayed(model))
    found, gradients = both(model, lambda: segments(model, **options))
    assert gap(found, expected) <= 1e-9
    assert_same(gradients, expected_gradients, 1e-8)


@pytest.mark.parametrize("schedules", [[Schedule(4), Schedule(9)], [Schedule(8, 0.25), Schedule(8, 0.6)]], ids=str)
def test_every_sample_has_its_own_window_and_ratio(schedules):
    model = with_pte(tiny("llama"))
    expected, expected_gradients = both(model, lambda: replayed(model, schedules))
    found, gradients = both(model, lambda: segments(model, schedules))
    assert gap(found, expected) <= 1e-9
    assert_same(gradients, expected_gradients, 1e-8)


@pytest.mark.parametrize("window", [1, 2, 100])
def test_odd_windows(window):
    model = with_pte(tiny("qwen2"))
    assert gap(segments(model, window), replayed(model, window)) <= 1e-9


def test_full_training_of_the_base_model_too():
    model = tiny("qwen2")
    _, expected = both(model, lambda: replayed(model))
    _, gradients = both(model, lambda: segments(model))
    used = {name: g for name, g in expected.items() if g.norm() > 1e-6}
    assert_same({name: gradients[name] for name in used}, used, 1e-8)


def test_the_fused_head_and_gradient_checkpointing():
    base = tiny("qwen2", torch.float32)
    add_fused_lm_head(base, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    model = with_pte(base).train()
    expected, expected_gradients = both(model, lambda: replayed(model))
    base.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    found, gradients = both(model, lambda: segments(model, temperature=None))
    assert base.is_gradient_checkpointing
    assert gap(found, expected) <= 1e-4
    assert_same(gradients, expected_gradients, 1e-3)
    _, entropies = segment_logps(model, IDS, MASK, PROMPT, Schedule(WINDOW))
    logps = replay_logps(model, IDS, MASK, PROMPT, WINDOW)
    assert gap(entropies, -(logps.exp() * logps).sum(-1)) <= 1e-4


def test_padded_places_are_zero_as_in_one_pass():
    model, mask = with_pte(tiny("llama")), MASK.clone()
    mask[0, -9:] = 0
    found = segment_logps(model, IDS, mask, PROMPT, Schedule(WINDOW), temperature=TEMPERATURE)[0]
    expected = chosen(replay_logps(model, IDS, mask, PROMPT, WINDOW), IDS, PROMPT) * mask[:, PROMPT:]
    assert gap(found, expected) <= 1e-9
    assert not found[0, -9:].any() and found[1, -9:].all()


def test_a_second_backward_is_refused():
    model = with_pte(tiny("llama"))
    loss = segments(model).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


class Held:
    """A tensor saved for backward that counts while it is held."""

    now = most = 0

    def __init__(self, tensor):
        # Detached: an operation that saves its own result would otherwise hold itself.
        self.tensor, self.bytes = tensor.detach(), tensor.nbytes
        Held.now += self.bytes
        Held.most = max(Held.most, Held.now)

    def __del__(self):
        Held.now -= self.bytes


def bytes_held(model, length: int, view) -> int:
    """The most bytes that autograd held at once for a completion of this length."""
    ids, mask, prompt = left_padded_batch([6, 3], length)
    gc.collect()
    Held.now = Held.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        view(model, ids, mask, prompt).sum().backward()
    return Held.most


def test_what_autograd_holds_does_not_grow_with_the_completion():
    model = with_pte(tiny("llama", torch.float32))

    def by_segments(model, ids, mask, prompt):
        return segment_logps(model, ids, mask, prompt, Schedule(WINDOW), segment_length=CUT, temperature=1.0)[0]

    def in_one_pass(model, ids, mask, prompt):
        return chosen(replay_logps(model, ids, mask, prompt, WINDOW), ids, prompt)

    short, long = (bytes_held(model, length, by_segments) for length in (40, 160))
    assert 0 < long <= 1.02 * short
    assert bytes_held(model, 160, in_one_pass) > 3 * bytes_held(model, 40, in_one_pass) > 3 * short
