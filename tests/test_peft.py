"""PTE as a PEFT method: everything PEFT offers works, or is refused with a message that says why."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from pte_trl import BoundedCache, PteConfig
from pte_trl.adapter import PteAttention, PteLinear
from tests.models import ALL_SEVEN, gap, left_padded_batch, randomise_up, replay_logps, tiny, with_pte

WINDOW = 6
SMALL = {"rank": 5, "num_global_tokens": 6, "alpha": 5.0}


@pytest.fixture
def batch():
    return left_padded_batch([6, 3], 24)


def base(seed=7, **kwargs):
    torch.manual_seed(seed)
    return tiny(**kwargs)


@torch.no_grad()
def logps(model, batch):
    return replay_logps(model, *batch, WINDOW)


@pytest.mark.parametrize(
    "config", [{}, {"target_modules": ALL_SEVEN, "read": "column", "state_update": "sum"}, {"whiten": True}]
)
def test_save_and_load(tmp_path, batch, config):
    model = with_pte(base(), **config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logps(model, batch), logps(loaded, batch))
    assert gap(logps(model, batch), logps(base(), batch)) > 1e-3
    found, expected = loaded.peft_config["default"].to_dict(), model.peft_config["default"].to_dict()
    assert found.pop("inference_mode") and not expected.pop("inference_mode")
    assert found == expected


def test_whiteners_are_wide_and_not_trained(tmp_path):
    """Of a model in bfloat16, also when PEFT switches adapters, and in the file."""
    torch.manual_seed(0)
    model = get_peft_model(base(dtype=torch.bfloat16), PteConfig(**SMALL, whiten=True))
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    found = {name: tensor for name, tensor in model.state_dict().items() if "whitener" in name}
    assert len(found) == 2 * 3 and all(tensor.dtype == torch.float32 for tensor in found.values())
    assert not any("whitener" in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("whitener" in name for name in saved) == len(found)
    narrow = model.to(torch.bfloat16)  # as DeepSpeed casts a model, adapter and all
    assert replay_logps(narrow, *left_padded_batch([6, 3], 24), WINDOW).isfinite().all()


def test_saved_file_holds_the_adapter_and_nothing_else(tmp_path):
    model = with_pte(base())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], trained[name]) for name in saved)


def test_loaded_for_inference_or_for_training(tmp_path):
    model = with_pte(base())
    model.save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=trainable)
        assert {p.requires_grad for name, p in loaded.named_parameters() if "pte_" in name} == {trainable}
        assert not any(p.requires_grad for name, p in loaded.named_parameters() if "pte_" not in name)


def test_disable_adapter_is_the_base_model(batch):
    model, plain = with_pte(base(), target_modules=ALL_SEVEN), logps(base(), batch)
    adapted = logps(model, batch)
    with model.disable_adapter():
        assert torch.equal(logps(model, batch), plain)
    assert torch.equal(logps(model, batch), adapted)


def add(model, name, seed, **config):
    torch.manual_seed(seed)
    model.add_adapter(name, PteConfig(**{**SMALL, **config}))
    randomise_up(model, name)


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_several_named_adapters(batch):
    """Adapters of different shapes and targets on one base each give what they give alone."""
    other = {"rank": 3, "num_global_tokens": 4, "target_modules": ALL_SEVEN, "read": "column", "state_update": "sum"}
    model = with_pte(base())
    alone = logps(model, batch)
    add(model, "second", seed=9, **other)
    assert torch.equal(logps(model, batch), alone)
    assert all(".default" in name for name in trained_names(model))

    model.set_adapter("second")
    second = logps(model, batch)
    assert torch.equal(second, logps(with_pte(base(), seed=9, adapter_name="second", **other), batch))
    assert gap(second, alone) > 1e-3
    names = trained_names(model)
    assert names and all(".second" in name for name in names)

    model.set_adapter("default")
    assert torch.equal(logps(model, batch), alone)
    model.delete_adapter("second")
    assert torch.equal(logps(model, batch), alone)
    assert not any(".second" in name for name, _ in model.named_parameters())


def test_second_adapter_is_what_it_is_alone(tmp_path, batch):
    model = with_pte(base())
    add(model, "second", seed=9, target_modules=ALL_SEVEN)
    model.set_adapter("second")
    expected = logps(model, batch)
    model.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(base(), tmp_path / "second")
    assert torch.equal(logps(alone, batch), expected)
    model.load_adapter(tmp_path / "second", adapter_name="third")
    model.set_adapter("third")
    assert torch.equal(logps(model, batch), expected)


def test_deleting_the_active_adapter_activates_the_other(batch):
    model = with_pte(base())
    add(model, "second", seed=9)
    model.set_adapter("second")
    expected = logps(model, batch)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="default was active"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(logps(model, batch), expected)


def test_two_active_adapters_are_refused(batch):
    model = with_pte(base())
    add(model, "second", seed=9)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"\['default', 'second'\].*one PTE adapter can be active"):
        logps(model, batch)


def test_cache_of_another_adapter_is_refused():
    model, cache = with_pte(base()), BoundedCache(WINDOW)
    add(model, "second", seed=9)
    ids = torch.arange(1, 6).view(1, -1)
    model(input_ids=ids, past_key_values=cache)
    model.set_adapter("second")
    with pytest.raises(ValueError, match="holds the state of adapter 'default', but 'second' is active"):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_trainable_parameters_are_counted(capsys):
    model = with_pte(base())
    encoder = 6 * 32 + 5 * (32 + 16 + 16)  # global tokens and three maps
    linears = 2 * (32 * 6 + 5 * 32)  # q_proj and o_proj: down and up
    assert model.get_nb_trainable_parameters()[0] == 3 * (encoder + linears)
    model.print_trainable_parameters()
    assert f"trainable params: {3 * (encoder + linears):,}" in capsys.readouterr().out


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_and_breaks_nothing(batch, merge):
    model = with_pte(base())
    before = logps(model, batch)
    with pytest.raises(ValueError, match=r"cannot be merged.*differs from sample to sample"):
        getattr(model, merge)()
    assert torch.equal(logps(model, batch), before)


def test_unload_gives_the_base_model_back(batch):
    plain = base()
    attention = type(plain.model.layers[0].self_attn)
    unloaded = with_pte(base(), target_modules=ALL_SEVEN).unload()
    assert type(unloaded) is type(plain)
    expected, found = plain.state_dict(), unloaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not any(isinstance(m, PteAttention | PteLinear) for m in unloaded.modules())
    for layer in unloaded.model.layers:
        assert type(layer.self_attn) is attention
        assert all(type(m) is nn.Linear for m in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj))
    assert torch.equal(logps(unloaded, batch), logps(plain, batch))
    assert gap(logps(with_pte(unloaded), batch), logps(plain, batch)) > 1e-3  # it can be adapted again


def test_one_config_serves_two_shapes():
    config = PteConfig(rank=4, num_global_tokens=3)
    small, large = (get_peft_model(base(num_hidden_layers=n), config) for n in (1, 2))
    assert config.geometry is None
    assert small.peft_config["default"].geometry["num_hidden_layers"] == 1
    assert large.peft_config["default"].geometry["num_hidden_layers"] == 2


def test_another_geometry_names_both(tmp_path):
    with_pte(base()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"made for num_hidden_layers=3; the model has num_hidden_layers=2"):
        PeftModel.from_pretrained(base(num_hidden_layers=2), tmp_path)
    with pytest.raises(ValueError, match=r"model_type=qwen2.*head_dim=8.*model_type=llama.*head_dim=4"):
        PeftModel.from_pretrained(base(family="llama", head_dim=4), tmp_path)


def test_a_model_without_a_place_for_pte_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=16))
    with pytest.raises(ValueError, match="GPT2LMHeadModel: PTE finds no attention"):
        get_peft_model(model, PteConfig())


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("mistral", {"sliding_window": 8}, "mistral has sliding_attention"),
        ("llama", DYNAMIC, "rope_type='dynamic'"),
        ("llama", {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, "quantised weights"),
    ],
)
def test_models_that_would_be_silently_wrong_are_refused(family, config, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny(family, **config), PteConfig())


@pytest.mark.parametrize(
    "bad",
    [
        {"rank": 0},
        {"rank": 2.5},
        {"num_global_tokens": -1},
        {"alpha": 0},
        {"init_ratio": -0.1},
        {"dropout": 1.0},
        {"state_update": "mean"},
        {"read": "rows"},
        {"normalisation": "layer"},
        {"target_modules": []},
        {"target_modules": "q_proj"},
        {"target_modules": ["q_proj", "query"]},
    ],
    ids=str,
)
def test_bad_config_values_are_named(bad):
    key, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"{key}=") as error:
        PteConfig(**bad)
    assert repr(value if not isinstance(value, list) or not value else value[-1]) in str(error.value)


def test_adapter_of_a_bfloat16_model_is_float32(batch):
    model = get_peft_model(base(dtype=torch.bfloat16), PteConfig(**SMALL, target_modules=ALL_SEVEN))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert logps(model, batch).isfinite().all()
