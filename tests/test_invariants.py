"""What must not change anything, and the traps that others fell into."""

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import kl_div

from pte_trl import BoundedCache, PteConfig
from pte_trl.adapter.calibration import calibrate, filled, inverse_root, keys_and_values, second_moments
from pte_trl.adapter.model import pte_layers
from tests.models import (
    ALL_SEVEN,
    ATTENTION,
    chosen,
    decode_logps,
    gap,
    left_padded_batch,
    log_probs,
    replay_logps,
    tiny,
    with_lora,
    with_pte,
)

WINDOW, COMPLETION = 8, 30
EXACT = 1e-9
ARMS = {
    "bare": lambda: tiny(),
    "lora": lambda: with_lora(tiny()),
    "pte": lambda: with_pte(tiny()),
    "pte-seven": lambda: with_pte(tiny("llama"), target_modules=ALL_SEVEN),
}


@pytest.fixture(params=ARMS)
def model(request):
    return ARMS[request.param]()


@torch.no_grad()
def test_wide_window_is_the_full_cache(model):
    ids, mask, prompt = left_padded_batch([7, 4], COMPLETION)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    full = log_probs(model(input_ids=ids, attention_mask=mask, position_ids=position_ids).logits[:, prompt - 1 : -1])
    for window in (COMPLETION, COMPLETION + 7):
        assert gap(full, replay_logps(model, ids, mask, prompt, window)) <= EXACT
        assert gap(full, decode_logps(model, ids, mask, prompt, window)) <= EXACT
    assert gap(full, replay_logps(model, ids, mask, prompt, WINDOW)) > 1e-3


@pytest.mark.parametrize("view", [decode_logps, replay_logps])
@torch.no_grad()
def test_a_batch_is_its_samples_alone_and_unpadded(model, view):
    """Trap 3 as well: were padding counted as prompt, or prompt as thought, the short prompt would differ."""
    lengths = [7, 2, 5]
    ids, mask, prompt = left_padded_batch(lengths, COMPLETION)
    together = view(model, ids, mask, prompt, WINDOW)
    for row, length in enumerate(lengths):
        one, padding = slice(row, row + 1), prompt - length
        assert gap(together[one], view(model, ids[one], mask[one], prompt, WINDOW)) <= EXACT
        alone = view(model, ids[one, padding:], mask[one, padding:], length, WINDOW)
        assert gap(together[one], alone) <= EXACT


@torch.no_grad()
def test_what_stands_in_the_padding_is_never_seen(model):
    ids, mask, prompt = left_padded_batch([7, 3], COMPLETION)
    other = ids.masked_fill(mask == 0, 9)
    for view in (decode_logps, replay_logps):
        assert gap(view(model, ids, mask, prompt, WINDOW), view(model, other, mask, prompt, WINDOW)) <= EXACT


@torch.no_grad()
def test_right_padding_behind_a_finished_completion_changes_nothing(model):
    ids, mask, prompt = left_padded_batch([7, 4], COMPLETION)
    finished = 19
    mask[1, prompt + finished :] = 0
    padded = replay_logps(model, ids, mask, prompt, WINDOW)[1:, :finished]
    alone = replay_logps(model, ids[1:, : prompt + finished], mask[1:, : prompt + finished], prompt, WINDOW)
    assert gap(padded, alone) <= EXACT


@pytest.mark.parametrize("view", [decode_logps, replay_logps])
@torch.no_grad()
def test_the_future_is_never_seen(model, view):
    ids, mask, prompt = left_padded_batch([7, 4], COMPLETION)
    other, at = ids.clone(), 17
    other[:, prompt + at] = (other[:, prompt + at] + 1) % 60 + 1
    before, after = (view(model, x, mask, prompt, WINDOW) for x in (ids, other))
    assert gap(before[:, : at + 1], after[:, : at + 1]) <= EXACT
    assert gap(before[:, at + 1], after[:, at + 1]) > 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], ATTENTION, ALL_SEVEN], ids=["qo", "qkvo", "seven"])
@torch.no_grad()
def test_untrained_adapter_is_the_base_model(targets, dtype):
    ids, mask, prompt = left_padded_batch([7, 4], COMPLETION)
    views = (decode_logps, replay_logps)
    torch.manual_seed(0)
    model = get_peft_model(tiny(dtype=dtype), PteConfig(rank=4, num_global_tokens=4, target_modules=targets))
    torch.manual_seed(0)
    base = tiny(dtype=dtype)
    found = [view(model, ids, mask, prompt, WINDOW) for view in views]
    expected = [view(base, ids, mask, prompt, WINDOW) for view in views]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_base_weights_stay_bit_identical_in_training():
    model = with_pte(tiny(dtype=torch.bfloat16))
    model.base_model._cast_adapter_dtype("default", autocast_adapter_dtype=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids, mask, prompt = left_padded_batch([7, 4], COMPLETION)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        chosen(replay_logps(model.train(), ids, mask, prompt, WINDOW), ids, prompt).mean().neg().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        assert ("pte_" in name) == parameter.requires_grad, name


@torch.no_grad()
def test_positions_stay_absolute_after_evictions():
    """Trap 4: `generate` asks the cache for its length to place the next token."""
    model, cache = tiny(), BoundedCache(window=4)
    ids, mask, prompt = left_padded_batch([5], 20)
    model(input_ids=ids[:, :prompt], past_key_values=cache)
    for t in range(prompt, ids.shape[1] - 1):
        assert cache.get_seq_length() == t
        # no position ids given: the model takes them from the cache
        logits = model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits
    assert cache.evictions > 10
    expected = replay_logps(model, ids, mask, prompt, 4)
    assert gap(log_probs(logits[:, -1]), expected[:, -1]) <= EXACT


@torch.no_grad()
def test_the_prompt_is_never_evicted():
    """Trap 3: after many evictions the cache still begins with exactly the prompt's keys, padding or not."""
    model, cache = tiny(), BoundedCache(window=4)
    ids, mask, prompt = left_padded_batch([6, 2], 25)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    for start, stop in [(0, prompt)] + [(t, t + 1) for t in range(prompt, ids.shape[1])]:
        where = {"attention_mask": mask[:, :stop], "position_ids": position_ids[:, start:stop]}
        model(input_ids=ids[:, start:stop], past_key_values=cache, **where)
        if start == 0:
            first = [layer.keys.clone() for layer in cache.layers]
    assert cache.evictions > 10
    for layer, keys in zip(cache.layers, first, strict=True):
        assert torch.equal(layer.keys[:, :, :prompt], keys)
        assert layer.keys.shape[2] <= prompt + 4


def test_every_tensor_learns():
    """Trap 5: no parameter is cut off by a stray detach; a KL to the full-cache base as the loss."""
    model = with_pte(tiny(), target_modules=ALL_SEVEN)
    ids, mask, prompt = left_padded_batch([7, 4], COMPLETION)
    with torch.no_grad(), model.disable_adapter():
        teacher = replay_logps(model, ids, mask, prompt, COMPLETION)
    kl_div(replay_logps(model, ids, mask, prompt, WINDOW), teacher, log_target=True, reduction="sum").backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 1e-9, name
        else:
            assert parameter.grad is None, name


@torch.no_grad()
def test_a_forward_without_cache_leaves_nothing_behind(model):
    """State that decoding changes lives in the cache: a decode in between must not change a replay."""
    ids, mask, prompt = left_padded_batch([7, 4], COMPLETION)
    before = replay_logps(model, ids, mask, prompt, WINDOW)
    decode_logps(model, ids.flip(0), mask.flip(0), prompt, 3)
    assert torch.equal(before, replay_logps(model, ids, mask, prompt, WINDOW))


@pytest.mark.parametrize("init_ratio", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@torch.no_grad()
def test_calibrate_gives_the_asked_ratio(family, init_ratio):
    model = with_pte(tiny(family), init_ratio=init_ratio)
    for layer in pte_layers(model):  # key biases as large as real models have
        if layer.base_layer.k_proj.bias is not None:
            layer.base_layer.k_proj.bias.mul_(200)
    ids, mask, _ = left_padded_batch([12, 12], 0)
    found = calibrate(model, ids, mask, evict=4)
    assert len(found) == 3
    again = calibrate(model, ids, mask, evict=4)
    assert again == pytest.approx([init_ratio] * 3, rel=1e-6)
    assert any(abs(ratio - init_ratio) > 0.05 for ratio in found)


@torch.no_grad()
def test_whitening_spreads_keys_that_lie_on_one_line():
    """Key biases as large as real models have; the share of the largest direction of a head of eight."""
    model = with_pte(tiny("qwen2"), whiten=True)
    for layer in pte_layers(model):
        layer.base_layer.k_proj.bias.mul_(200)
    ids, mask, _ = left_padded_batch([40] * 8, 0)
    calibrate(model, ids, mask, evict=10)
    for layer, call, *cached in keys_and_values(model, ids, mask):
        encoder = layer.pte_encoder["default"]
        cached = [x.transpose(1, 2).flatten(2) for x in cached]
        update = encoder.update(layer.start("default", call)[0], *(x[:, -10:] for x in encoder.latents(*cached)))
        assert update.norm(dim=(1, 2)).mean().item() == pytest.approx(0.25 * 30**0.5, rel=1e-3)
        shares = [
            torch.linalg.svdvals(keys[:, 1:].flatten(0, 1).unflatten(1, (2, 8)).transpose(0, 1)).square()
            for keys in (cached[0], encoder._whiten(cached[0], encoder.key_whitener))
        ]
        before, after = ((s[:, 0] / s.sum(1)).tolist() for s in shares)
        assert all(b > 1.5 * a for b, a in zip(before, after, strict=True)), (before, after)


def test_dimensions_filled():
    torch.manual_seed(0)
    line, cloud = torch.randn(4000, 1, 1) * torch.randn(2, 8), torch.randn(4000, 2, 8) * torch.arange(1, 9)
    assert filled(second_moments(line)).tolist() == pytest.approx([1, 1], abs=1e-3)
    white = torch.einsum("nhi,hij->nhj", cloud, inverse_root(second_moments(cloud)))
    assert (filled(second_moments(cloud)) < 5).all() and (filled(second_moments(white)) > 7.5).all()


@torch.no_grad()
def test_watched_ratio_is_that_of_the_evictions():
    """|S'| / |S| as the trainer logs it, after a calibration on tokens like the evicted ones."""
    model = with_pte(tiny(), target_modules=["q_proj", "o_proj"], init_ratio=0.25)
    ids, mask, prompt = left_padded_batch([40, 40], 30)
    calibrate(model, ids[:, :prompt], mask[:, :prompt], evict=2)
    for layer in pte_layers(model):
        layer.watch_updates = True
    replay_logps(model, ids, mask, prompt, WINDOW)
    for layer in pte_layers(model):
        assert 0.25 / 3 < layer.update_ratio.item() < 0.25 * 3
