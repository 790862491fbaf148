"""An adapter may be called like anything in the model: it is found again under any other name, bit for bit."""

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from pte_trl import PteConfig
from pte_trl.adapter.fit import OWN_PARTS, split_key, without_adapter_name
from pte_trl.adapter.updates import UPDATES
from tests.models import gap, left_padded_batch, randomise_up, replay_logps, tiny, with_pte

BATCH = left_padded_batch([3, 2], 7)
SMALL = {"rank": 5, "num_global_tokens": 6, "alpha": 5.0, "whiten": True, "target_modules": "all-linear"}


def base():
    torch.manual_seed(7)
    return tiny(num_hidden_layers=1)


@torch.no_grad()
def logps(model):
    return replay_logps(model.eval(), *BATCH, 4)


def parts() -> tuple[list[str], list[str]]:
    """Every part of the name of a module of a PTE model with a module to save, and of its parameters and buffers."""
    modules, tensors = set(), {"default"}
    for update in UPDATES:
        options = {"whiten": True, "centre": True, "write_gate": True, "state_update": update}
        model = with_pte(base(), **options, target_modules="all-linear", modules_to_save=["lm_head"])
        modules |= {part for name, _ in model.named_modules() for part in name.split(".") if part}
        tensors |= {part for name in model.get_base_model().state_dict() for part in name.split(".")}
    return sorted(modules), sorted(tensors - {"default"})


MODULES, TENSORS = parts()
ODD = [
    *("a-b", "ünï", "名前", "with space", "123", "v1_final", "%s", "[x]", "a|b", "\\1", "$", "x" * 100),
    *("in_use", "config", "scale", "dropout", "read", "pte", "pte_", "lora_A", "self", "None", "active_adapter"),
]
IMPOSSIBLE = ["", "a.b", ".", "train", "keys", "forward", "training", "weight.default"]


@pytest.fixture(scope="module")
def usual():
    return with_pte(base(), seed=3, **SMALL)


@pytest.mark.parametrize("name", sorted({*MODULES, *TENSORS, *ODD}))
def test_an_adapter_of_any_name_is_the_same_under_another(name, usual):
    """Through the state dict that `save_pretrained` writes, from that name to `default` and back."""
    torch.manual_seed(1)
    model = get_peft_model(base(), PteConfig(**SMALL), adapter_name=name, autocast_adapter_dtype=False)
    randomise_up(model, name)
    expected, state = logps(model), get_peft_model_state_dict(model, adapter_name=name)
    assert state.keys() == get_peft_model_state_dict(usual).keys()
    set_peft_model_state_dict(usual, {key: torch.zeros_like(tensor) for key, tensor in state.items()})
    assert gap(logps(usual), expected) > 1e-6
    assert set_peft_model_state_dict(usual, state).unexpected_keys == []
    assert torch.equal(logps(usual), expected)
    with torch.no_grad():
        for tensor in state.values():
            tensor.zero_()
    set_peft_model_state_dict(model, get_peft_model_state_dict(usual), adapter_name=name)
    assert torch.equal(logps(model), expected)


@pytest.mark.parametrize("name", ["weight", "pte_encoder", "ünï", "lm_head"])
def test_the_same_through_files(name, tmp_path):
    config = {**SMALL, "modules_to_save": ["norm"]}
    torch.manual_seed(1)
    model = get_peft_model(base(), PteConfig(**config), adapter_name=name, autocast_adapter_dtype=False)
    randomise_up(model, name)
    model.save_pretrained(tmp_path)
    folder = tmp_path / name
    found = PeftModel.from_pretrained(base(), folder)
    assert torch.equal(logps(found), logps(model))
    found.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(base(), tmp_path / "again", adapter_name=name)
    assert torch.equal(logps(again), logps(model))


@pytest.mark.parametrize("name", IMPOSSIBLE, ids=repr)
def test_a_name_that_no_module_can_have_is_refused(name):
    model = base()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="PyTorch cannot give it to a module"):
        get_peft_model(model, PteConfig(**SMALL), adapter_name=name)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("name", TENSORS)
def test_beside_another_adapter_such_a_name_is_refused(name, usual):
    """PEFT tells several adapters apart by the text of their keys: `weight` would take all of another's away."""
    keys = usual.state_dict().keys()
    with pytest.raises(ValueError, match=f"^adapter name {name!r}: is also the name of a module or parameter"):
        usual.add_adapter(name, PteConfig(**SMALL))
    assert list(usual.peft_config) == ["default"] and usual.state_dict().keys() == keys


@pytest.mark.parametrize("name", ["weight", "q_proj", "pte_up", "key_map"])
def test_nor_may_another_come_beside_it(name):
    odd = get_peft_model(base(), PteConfig(**SMALL), adapter_name=name)
    with pytest.raises(ValueError, match=f"^adapter name {name!r}: is also"):
        odd.add_adapter("default", PteConfig(**SMALL))


@pytest.mark.parametrize("name", sorted({*MODULES, *ODD, "default2", "defaul"} - {*TENSORS, "default"}))
def test_beside_another_adapter_any_other_name_works(name, usual):
    model = with_pte(base(), **SMALL)
    model.add_adapter(name, PteConfig(**SMALL), autocast_adapter_dtype=False)
    randomise_up(model, name)
    first = logps(model)
    model.set_adapter(name)
    second = logps(model)
    assert gap(first, second) > 1e-6
    for each, expected in (("default", first), (name, second)):
        set_peft_model_state_dict(usual, get_peft_model_state_dict(model, adapter_name=each))
        assert torch.equal(logps(usual), expected)
    model.delete_adapter("default")
    assert torch.equal(logps(model), second)


def test_own_parts_are_those_that_pte_brings():
    bare = {part for name, _ in base().named_modules() for part in name.split(".")}
    bare |= {part for name in base().state_dict() for part in name.split(".")}
    assert {*TENSORS} - bare <= OWN_PARTS


def test_names_are_taken_from_keys_at_their_place_only():
    assert split_key("a.q_proj.pte_up.default.weight") == ("a.q_proj.", "pte_up", ".default.weight")
    assert split_key("lm_head.weight") == ("lm_head.weight", None, "")
    assert without_adapter_name("a.pte_up.pte_up.weight", "pte_up") == "a.pte_up.weight"
    assert without_adapter_name("a.pte_encoder.key_map.key_map.weight", "key_map") == "a.pte_encoder.key_map.weight"
    assert without_adapter_name("a.pte_up.ab.weight", "a") == "a.pte_up.ab.weight"
    assert without_adapter_name("a.weight", "weight") == "a.weight"
