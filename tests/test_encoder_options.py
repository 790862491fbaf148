"""What the encoder's options promise beyond the tables of the other tests (`tests.models.OPTIONS`)."""

import json

import pytest
import torch
from peft import PeftModel

from pte_trl import PteConfig
from pte_trl.adapter.calibration import calibrate, keys_and_values
from pte_trl.adapter.encoder import Encoder
from pte_trl.adapter.fit import check_supported
from pte_trl.adapter.model import active_layers
from pte_trl.adapter.projections import rows
from pte_trl.adapter.updates import CHUNK, SOLVED, UPDATES, Delta, GatedSum
from pte_trl.cache.schedule import Schedule
from pte_trl.inspect.states import inspect
from tests.models import OPTIONS, gap, left_padded_batch, replay_logps, start_of, tiny, with_pte

RANK, TOKENS = 5, 4
CONFIG = PteConfig(rank=RANK, num_global_tokens=TOKENS)
BATCH = left_padded_batch([5, 3], 12)


def rule_of(kind, parameter: float):
    rule = kind(CONFIG).double()
    with torch.no_grad():
        for weight in rule.parameters():
            weight.copy_(torch.linspace(-1, 1, weight.numel()) + parameter)
    return rule


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", UPDATES.values(), ids=UPDATES)
@torch.no_grad()
def test_all_evictions_at_once_are_one_after_another(kind):
    """More of them than one weighted sum takes."""
    torch.manual_seed(0)
    rule, queries = rule_of(kind, 2.0), random(TOKENS, RANK)
    accumulator, found = rule.first(random(TOKENS, RANK)), []
    updates = rule.update(queries, random(2, CHUNK + 7, 3, RANK), random(2, CHUNK + 7, 3, RANK))
    together = rule.advance_all(accumulator, updates)
    for update in updates.unbind(1):
        accumulator = rule.advance(accumulator, update)
        found.append(accumulator)
    assert gap(together, torch.stack(found, dim=1)) < 1e-10
    assert rule.state(together).shape == (2, CHUNK + 7, TOKENS, RANK)


@torch.no_grad()
def test_the_delta_rule_does_not_depend_on_how_many_tokens_leave_at_once():
    torch.manual_seed(0)
    rule, queries, start = rule_of(Delta, 1.0), random(TOKENS, RANK), random(TOKENS, RANK)
    keys, values = random(2 * SOLVED + 22, RANK), random(2 * SOLVED + 22, RANK)
    found = []
    for size in (1, 10, len(keys)):
        accumulator = rule.first(start)
        for k, v in zip(keys.split(size), values.split(size), strict=True):
            accumulator = rule.advance(accumulator, rule.update(queries, k, v))
        found.append(accumulator)
    assert gap(found[0], found[1]) < 1e-12 and gap(found[0], found[2]) < 1e-12
    state = rule.first(start)[:TOKENS] + queries @ found[0][TOKENS:]
    assert gap(found[0][:TOKENS], state) < 1e-12


@torch.no_grad()
def test_the_delta_rule_forgets_what_it_overwrites_and_stays_small_where_keys_are_alike():
    torch.manual_seed(0)
    rule, queries = rule_of(Delta, 8.0), torch.eye(RANK, dtype=torch.float64)[:TOKENS]  # a rate of almost 1
    keys = random(1, RANK).expand(256, RANK) + 1e-3 * random(256, RANK)
    values = random(256, RANK)
    memory = rule.advance(rule.first(torch.zeros_like(queries)), rule.update(queries, keys, values))[TOKENS:]
    assert gap(memory.T @ (keys[-1] / keys[-1].norm()), values[-1]) < 1e-2
    assert memory.norm() < 2 * values.norm(dim=1).max()


@torch.no_grad()
def test_a_forget_gate_of_one_is_the_sum():
    torch.manual_seed(0)
    updates, start = random(2, 9, TOKENS, RANK), random(TOKENS, RANK)
    gated = rule_of(GatedSum, 60.0).advance_all(start, updates)
    assert gap(gated, rule_of(UPDATES["sum"], 0.0).advance_all(start, updates)) < 1e-12


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_calibration_sets_the_first_eviction(option):
    model = with_pte(tiny("qwen2"), **OPTIONS[option])
    for layer in active_layers(model):
        layer.base_layer.k_proj.bias.mul_(20)
    ids, mask, _ = left_padded_batch([40] * 4, 0)
    calibrate(model, ids, mask, evict=8)
    for layer, call, *cached in keys_and_values(model, ids, mask):
        encoder = layer.pte_encoder["default"]
        latents = encoder.latents(*(rows(x[:, :, -8:]) for x in cached))
        written = encoder.written(encoder.update(layer.start("default", call)[0], *latents))
        assert written.norm(dim=(1, 2)).mean().item() == pytest.approx(0.25 * 30**0.5, rel=1e-6)


@torch.no_grad()
def test_the_mean_is_taken_out_of_tokens_and_not_of_empty_places():
    model = with_pte(tiny("qwen2"), centre=True, whiten=True)
    ids, mask, _ = left_padded_batch([40] * 8, 0)
    calibrate(model, ids, mask, evict=8)
    encoder = active_layers(model)[1].pte_encoder["default"]
    keys, values = encoder.key_centre.flatten(), encoder.value_centre.flatten()
    assert keys.norm() > 1e-3 and max(x.abs().max() for x in encoder.latents(keys, values)) < 1e-9
    nothing = encoder.latents(torch.zeros_like(keys), torch.zeros_like(values))
    assert not any(x.any() for x in nothing)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_weight_has_a_gradient_where_nothing_is_evicted(option):
    model = with_pte(tiny(num_hidden_layers=1), **OPTIONS[option])
    replay_logps(model, *BATCH, 12).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def test_an_adapter_saved_before_these_options_still_loads(tmp_path):
    model = with_pte(tiny())
    expected, names = replay_logps(model, *BATCH, 4), model.state_dict().keys()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    held = json.loads(path.read_text())
    assert not any(held.pop(name) for name in ("centre", "write_gate", "state_per_head"))
    path.write_text(json.dumps(held))
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert loaded.state_dict().keys() == names and torch.equal(replay_logps(loaded, *BATCH, 4), expected)


def test_shares_of_tokens_are_refused_for_the_delta_rule():
    with pytest.raises(ValueError, match=r"^state_update='delta': .*allowed are recursive, sum and gated_sum"):
        inspect(with_pte(tiny(num_hidden_layers=1), state_update="delta"), [5, 6], [7] * 12, Schedule(4), pad=0)


def test_a_state_per_head_needs_an_equal_share_of_the_global_tokens():
    config = tiny(num_hidden_layers=1).config
    heads = config.num_key_value_heads
    adapter = PteConfig(num_global_tokens=heads + 1, state_per_head=True)
    assert heads > 1
    with pytest.raises(ValueError, match=rf"^num_global_tokens={heads + 1}: .*of the model.s {heads} kv heads"):
        check_supported(config, adapter=adapter)
    for values in (2, 4):  # heads of values, where a layer's own differ from the configuration's
        with pytest.raises(ValueError, match=r"^num_global_tokens=3: .*multiple of the 2 heads of keys.* there are "):
            Encoder(16, 16, (2, 8), (values, 8), PteConfig(num_global_tokens=3, state_per_head=True))


@torch.no_grad()
@pytest.mark.parametrize("update", UPDATES)
def test_a_state_per_head_is_of_that_head_alone(update):
    """What another head evicts changes nothing but the norm, which is the same number for all rows."""
    model = with_pte(tiny(num_hidden_layers=1), state_update=update, state_per_head=True)
    (layer,) = active_layers(model)
    encoder, heads = layer.pte_encoder["default"], model.config.num_key_value_heads
    queries, first = start_of(model, layer)
    keys, values = torch.randn(2, 1, 3, encoder.key_map.in_features, dtype=torch.float64)

    def rows_of_first(keys, values):
        found = encoder.advance(first, encoder.update(queries, *encoder.latents(keys, values)))
        rows = encoder.state(found)[0].chunk(heads)[0]
        return rows / rows.norm()

    width = keys.shape[-1] // heads
    others, own = torch.ones_like(keys), torch.ones_like(keys)
    others[..., width:], own[..., :width] = 2, 2
    expected = rows_of_first(keys, values)
    assert gap(rows_of_first(keys * others, values * others), expected) < 1e-6
    assert gap(rows_of_first(keys * own, values * own), expected) > 1e-3
