"""An adapter that is not what method, settings or model say, or is incomplete, is refused before the weights load."""

import json
import time

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config

from pte_trl import PteConfig
from pte_trl.adapter.check import (
    active_config,
    check_adapter,
    check_adapter_folder,
    expected_shapes,
    load_adapter,
    method_of,
    read_config,
)
from tests.models import tiny, with_lora, with_pte

QO = ["q_proj", "o_proj"]
PTE = PteConfig(rank=32, dropout=0.1)
LORA = LoraConfig(r=32, lora_alpha=16, target_modules=QO)
SAME = {
    "rank": 32,
    "alpha": 32,
    "adapter_dropout": 0.1,
    "target_modules": ["o_proj", "q_proj"],
    "whiten": False,
    "init_ratio": 0.25,
}


def base(**config):
    torch.manual_seed(7)
    return tiny(dtype=torch.float32, num_hidden_layers=2, **config)


def test_what_kind_of_adapter_it_is():
    assert [method_of(config) for config in (PTE, LORA, IA3Config())] == ["pte", "lora", "ia3"]


def test_the_adapter_a_model_runs_with(tmp_path):
    model = with_pte(base())
    model.add_adapter("other", PteConfig(rank=3))
    assert active_config(model).rank == 5
    model.set_adapter("other")
    assert active_config(model).rank == 3 and active_config(base()) is None
    assert method_of(active_config(with_lora(base()))) == "lora"
    model.save_pretrained(tmp_path)
    by_transformers = base()
    by_transformers.load_adapter(str(tmp_path / "other"), "x")
    assert active_config(by_transformers).rank == 3
    by_transformers.delete_adapter("x")
    assert active_config(by_transformers) is None


@pytest.mark.parametrize(
    ("method", "config"),
    [
        *(("pte", PTE), ("lora", LORA), ("lora_c", LORA), ("lora", None)),
        *(("lora", IA3Config()), ("lora_c", IA3Config()), ("lora", PromptTuningConfig(num_virtual_tokens=3))),
    ],
)
def test_a_method_takes_its_adapter(method, config):
    check_adapter(method, config)


MISMATCHED = [
    ("pte", None, {}, "method='pte': there is no adapter; give a PteConfig as peft_config"),
    ("lora_c", None, {}, "method='lora_c': there is no adapter; give a LoraConfig as peft_config"),
    ("pte", LORA, {}, "method='pte': peft_config is a LORA adapter, which takes method 'lora' or 'lora_c'"),
    ("pte", IA3Config(), {}, "peft_config is a IA3 adapter"),
    ("lora", PTE, {}, "method='lora': peft_config is a PTE adapter, which takes method 'pte'"),
    ("lora_c", PTE, {}, "method='lora_c': peft_config is a PTE adapter"),
    ("lora_c", PrefixTuningConfig(num_virtual_tokens=3), {}, "whose virtual tokens no window counts"),
    ("pte", PTE, {"rank": 4}, "rank=4, where the adapter has 32: peft_config was made with its own settings"),
    ("pte", PTE, {"adapter_dropout": 0.0}, r"adapter_dropout=0.0, where the adapter has 0.1"),
    (
        "pte",
        PTE,
        {"target_modules": ["q_proj"]},
        r"target_modules=\['q_proj'\], where the adapter has \['o_proj', 'q_",
    ),
    (
        "pte",
        PTE,
        {"rank": 4, "whiten": True},
        "rank=4, where the adapter has 32; whiten=True, where the adapter has F",
    ),
    ("lora", LORA, {"rank": 4}, "rank=4, where the adapter has 32"),
    ("lora", LORA, {"alpha": 32.0}, "alpha=32.0, where the adapter has 16"),
    ("lora_c", LORA, {"adapter_dropout": 0.5}, "adapter_dropout=0.5, where the adapter has 0.0"),
    ("lora_c", LORA, {"target_modules": QO[:1]}, r"where the adapter has \['o_proj', 'q_proj'\]"),
]


@pytest.mark.parametrize(("method", "config", "settings", "message"), MISMATCHED)
def test_another_adapter_than_the_settings_say_is_refused(method, config, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        check_adapter(method, config, settings=settings)
    assert "\n" not in str(error.value)


def test_settings_that_agree_or_are_another_methods_pass():
    check_adapter("pte", PTE, settings=SAME)
    lora = {"rank": 32, "alpha": 16.0, "target_modules": QO, "whiten": True, "num_global_tokens": 3}
    check_adapter("lora", LORA, settings=lora)


def test_the_source_is_named_and_the_model_compared():
    config = base().config
    made = with_pte(base()).peft_config["default"]
    check_adapter("pte", made, model_config=config, source="adapter='x'")
    with pytest.raises(ValueError, match="adapter='x' is a PTE adapter"):
        check_adapter("lora", made, source="adapter='x'")
    with pytest.raises(ValueError, match="made for num_hidden_layers=2; the model has num_hidden_layers=3"):
        check_adapter("pte", made, model_config=tiny().config)
    gpt2 = GPT2Config()
    with pytest.raises(ValueError, match="model_type='gpt2'"):
        check_adapter("pte", PteConfig(), model_config=gpt2)
    check_adapter("lora", LORA, model_config=gpt2)  # TRL untouched: any architecture


# ---- folders -----------------------------------------------------------------------------------------------------


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=16, n_positions=16))


def gpt2_lora():
    return get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


def embeddings_saved():
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    return get_peft_model(base(), config)


MADE = {
    "pte": lambda: with_pte(base(), whiten=True, target_modules="all-linear"),
    "pte, saved module": lambda: with_pte(base(), modules_to_save=["lm_head"], layers_to_transform=1),
    "lora": lambda: with_lora(base()),
    "lora, initialised by its base": lambda: get_peft_model(
        base(), LoraConfig(r=2, target_modules=QO, init_lora_weights="pissa")
    ),
    "lora of gpt2": gpt2_lora,
    "lora with embeddings": embeddings_saved,
    "ia3": lambda: get_peft_model(base(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("kind", MADE)
def test_a_whole_adapter_passes_and_its_shapes_are_those_of_its_file(kind, tmp_path):
    model = MADE[kind]()
    model.save_pretrained(tmp_path)
    model_config = model.get_base_model().config
    config = check_adapter_folder(tmp_path, model_config)
    assert type(config) is type(model.peft_config["default"])
    found = {name: tuple(t.shape) for name, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    expected, own = expected_shapes(config, model_config)
    assert expected == {name: shape for name, shape in found.items() if name in expected}
    assert found.keys() - expected.keys() <= own
    plain = gpt2() if "gpt2" in kind else base()
    assert isinstance(load_adapter(plain, tmp_path), PeftModel)


@pytest.fixture(params=["pte", "lora"])
def folder(request, tmp_path):
    model = MADE[request.param]()
    model.save_pretrained(tmp_path)
    return tmp_path, model.get_base_model().config


def change(folder, function) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(function(dict(tensors)), path)


def halve(tensors):
    return dict(list(tensors.items())[::2])


def poison(value):
    def poisoned(tensors):
        name = sorted(tensors)[-1]
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] = value
        return tensors

    return poisoned


def narrow(tensors):
    name = sorted(tensors)[0]
    return {**tensors, name: tensors[name][:-1].clone()}


DAMAGED = {
    "half": (
        lambda f: change(f, halve),
        r"adapter_model.safetensors lacks \d+ of the adapter's \d+ tensors, first base",
    ),
    "none": (lambda f: change(f, lambda t: {}), "lacks"),
    "NaN": (lambda f: change(f, poison(float("nan"))), r"1 of \d+ tensors hold NaN or infinity, first base_model"),
    "inf": (lambda f: change(f, poison(float("inf"))), "hold NaN or infinity"),
    "shape": (lambda f: change(f, narrow), r"has the shape \(\d+, \d+\); on this model it would be \("),
    "foreign": (lambda f: change(f, lambda t: {**t, "x.y": torch.ones(1)}), "holds 1 tensors that the model has no"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "needs adapter_model.safetensors"),
    "cut": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x00" * 40), "safetensors is damaged"),
    "empty": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "safetensors is damaged"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "needs adapter_config.json"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json is not JSON"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "peft_type=None, which PEFT does not know"),
    "other": (
        lambda f: (f / "adapter_config.json").write_text('{"peft_type": "X"}'),
        "peft_type='X', which PEFT does",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_adapter_is_refused_with_its_folder(damage, folder):
    path, model_config = folder
    break_it, message = DAMAGED[damage]
    break_it(path)
    with pytest.raises(ValueError, match=message) as error:
        check_adapter_folder(path, model_config)
    assert str(error.value).startswith(f"adapter={str(path)!r}: ") and "\n" not in str(error.value)
    if damage in ("half", "none"):
        with pytest.raises(ValueError, match="missing"):
            load_adapter(base(), path)


def test_bad_values_in_a_file_name_the_file(tmp_path):
    PteConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank": -3}))
    with pytest.raises(ValueError, match=r"^adapter=.*adapter_config.json: rank=-3: must be an integer"):
        read_config(tmp_path)


def test_another_model_is_refused_by_its_shapes(tmp_path):
    """LoRA's file does not say what it was made for; PEFT would notice when the base has been loaded."""
    with_lora(base()).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"lora_A.weight has the shape \(5, 32\); on this model it would be \(5, 64\)"
    ):
        check_adapter_folder(tmp_path, base(hidden_size=64, head_dim=16).config)
    with pytest.raises(ValueError, match="lacks 4 of the adapter's 12 tensors"):
        check_adapter_folder(tmp_path, tiny(num_hidden_layers=3).config)
    check_adapter_folder(tmp_path)  # without a model: whole as a file


def test_nothing_is_built_in_memory(tmp_path):
    """A base of 8 billion parameters is compared in the time of its modules, and the config stays as it was."""
    with_pte(base()).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    before, started = config.to_dict(), time.process_time()
    config.geometry = None
    before["geometry"] = None
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    large = Qwen2Config(**shape, num_attention_heads=32, num_key_value_heads=8)
    shapes, _ = expected_shapes(config, large)
    assert len(shapes) == 32 * 8 and config.to_dict() == before
    assert time.process_time() - started < 30  # building it in memory would take minutes, and 32 GB
