"""The replay's gradient is the decode's, and both are the derivative: every trainable tensor, none at zero."""

import pytest
import torch

from tests.grids import grid
from tests.models import (
    ALL_SEVEN,
    ATTENTION,
    OPTIONS,
    WideNorm,
    chosen,
    decode_logps,
    left_padded_batch,
    replay_logps,
    tiny,
    with_lora,
    with_pte,
)

WINDOW = 6  # E = 2
QO = ["q_proj", "o_proj"]
VARIANTS = {
    "qo": {"target_modules": QO},
    "qkvo": {"target_modules": ATTENTION},
    "seven": {"target_modules": ALL_SEVEN},
    "qo-sum": {"target_modules": QO, "state_update": "sum"},
    "seven-sum-column": {"target_modules": ALL_SEVEN, "state_update": "sum", "read": "column"},
    "qo-whitened": {"target_modules": QO, "whiten": True},
    "qo-column-row": {"target_modules": QO, "read": "column", "normalisation": "row"},
    **{name: {"target_modules": QO, **option} for name, option in OPTIONS.items()},
    # Where k and v are adapted they change what the next eviction encodes: the states are then set one by one.
    **{f"qkvo {name}": {"target_modules": ATTENTION, **option} for name, option in OPTIONS.items()},
}


def batch(completion=26):
    ids, mask, prompt = left_padded_batch([6, 3], completion)
    # per-token weights of mixed sign, as advantages are: a plain sum would hide errors that cancel
    weights = torch.randn(2, completion, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return ids, mask, prompt, weights


def loss_of(model, view=replay_logps, completion=26, **kwargs):
    ids, mask, prompt, weights = batch(completion)
    return (chosen(view(model, ids, mask, prompt, WINDOW, **kwargs), ids, prompt) * weights).sum()


def gradients(model, view=replay_logps, **kwargs) -> dict:
    model.zero_grad()
    loss_of(model, view, **kwargs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(found: dict, expected: dict, bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-6, f"{name}: the gradient is zero, nothing is tested"
        assert (found[name] - gradient).norm() <= bound * gradient.norm(), name


@grid(variant=VARIANTS, family=["qwen2", "llama"])
def test_replay_equals_autograd_through_the_decode(family, variant):
    model = with_pte(tiny(family), **VARIANTS[variant])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for part in ("global_tokens", "query_map", "key_map", "value_map", "pte_down", "pte_up"):
        assert any(part in name for name in trained)
    assert_same(gradients(model), gradients(model, decode_logps), 1e-8)


def test_lora_too():
    model = with_lora(tiny())
    assert_same(gradients(model), gradients(model, decode_logps), 1e-8)


@pytest.mark.parametrize("targets", [QO, ATTENTION], ids=["qo", "qkvo"])
def test_qwen3(targets):
    """Qwen3 norms queries and keys in float32 inside transformers, also in a float64 model.

    The decode computes a key once and sums its gradients before they pass that norm; the replay computes it once
    for the attention and once for the encoder, and each gradient is rounded alone. With a norm in the model's own
    precision the same model meets the tight bound.
    """
    model = with_pte(tiny("qwen3"), target_modules=targets)
    assert_same(gradients(model), gradients(model, decode_logps), 1e-5)
    model = with_pte(tiny("qwen3", wide_norms=True), target_modules=targets)
    assert_same(gradients(model), gradients(model, decode_logps), 1e-8)


# Of all seven linears with most settings changed; the others' gradients are compared with autograd's above.
@pytest.mark.parametrize(
    "variant",
    [v if v == "seven-sum-column" else pytest.param(v, marks=pytest.mark.thorough) for v in VARIANTS],
)
def test_central_differences(variant):
    """Two entries and one random direction of every tensor; norms in float64, or rounding would swamp the step."""
    model = with_pte(tiny(wide_norms=True), **VARIANTS[variant])
    assert any(isinstance(m, WideNorm) for m in model.modules())
    expected = gradients(model, completion=14)  # 4 evictions
    generator, step = torch.Generator().manual_seed(5), 1e-5
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        directions = [torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)]
        # the entries with the largest gradients, where a wrong sign or a lost path cannot hide
        for index in expected[name].abs().flatten().topk(min(2, parameter.numel())).indices:
            directions.append(torch.zeros_like(directions[0]))
            directions[-1].view(-1)[index] = 1.0
        for direction in directions:
            with torch.no_grad():
                losses = []
                for sign in (1, -2):
                    parameter.add_(direction, alpha=sign * step)
                    losses.append(loss_of(model, completion=14))
                parameter.add_(direction, alpha=step)
            measured = (losses[0] - losses[1]) / (2 * step)
            computed = (expected[name] * direction).sum()
            # relative to the gradient's size along this direction, so that an accidental near-zero is no failure
            scale = expected[name].norm() * direction.norm() / direction.numel() ** 0.5
            assert abs(measured - computed) <= 1e-4 * max(abs(computed), scale), name
        assert expected[name].norm() > 1e-6, name


def test_a_cut_path_would_be_seen():
    """Detaching the evicted keys and values, as a memory saver might, changes what the checks above compare."""
    model = with_pte(tiny())
    full = gradients(model)
    for layer in model.base_model.model.model.layers:
        encoder = layer.self_attn.pte_encoder["default"]
        latents = encoder.latents
        encoder.latents = lambda k, v, latents=latents: latents(k.detach(), v.detach())
    cut = gradients(model)
    first = next(iter(name for name in full if "layers.0" in name and "q_proj.pte_up" in name))
    assert (full[first] - cut[first]).norm() > 1e-2 * full[first].norm()


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("variant", ["qo", "seven", "qo-sum"])
def test_gradient_checkpointing_changes_nothing(variant, reentrant):
    model = with_pte(tiny("llama"), **VARIANTS[variant])
    model.train()
    expected = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.base_model.model.model.gradient_checkpointing
    assert_same(gradients(model), expected, 1e-10)


@pytest.mark.parametrize("ablation", ["use_global_tokens", "encode_evicted"])
def test_ablations_give_a_gradient_where_they_have_one(ablation):
    """global-0 has no S_0 to learn (the global tokens still ask); global-only learns nothing from the evicted."""
    model = with_pte(tiny(), target_modules=QO, **{ablation: False})
    assert_same(gradients(model), gradients(model, decode_logps), 1e-8)


def test_float32_gradients():
    model = with_pte(tiny(dtype=torch.float32), target_modules=ALL_SEVEN)
    assert_same(gradients(model), gradients(model, decode_logps), 1e-4)
