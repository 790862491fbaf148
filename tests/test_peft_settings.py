"""Every setting of PteConfig, PEFT and LoRA works here with a value that is not its default, or is refused by name."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from pte_trl import PteConfig
from pte_trl.adapter import PteAttention, PteLinear
from pte_trl.adapter.settings import LINEARS, REFUSED, RENAMED
from tests.models import decode_logps, gap, left_padded_batch, randomise_up, replay_logps, tiny

WINDOW = 6
SMALL = {"rank": 5, "num_global_tokens": 6, "alpha": 5.0}

# What a setting that changes the function of the model is tried with. Each must change the log-probs, and still
# decode and replay must agree.
CHANGES = {
    "rank": 4,
    "num_global_tokens": 3,
    "alpha": 12,
    "target_modules": "all-linear",
    "exclude_modules": ["layers.1.self_attn.o_proj"],
    "layers_to_transform": [0, 2],
    "modules_to_save": ["lm_head"],
    "state_update": "sum",
    "read": "column",
    "normalisation": "row",
    "use_global_tokens": False,
    "encode_evicted": False,
    "init_ratio": 0.5,
    "whiten": True,
    "centre": True,
    "write_gate": True,
    "state_per_head": True,
}
# Settings about where an adapter comes from and how it is used; each has a test of its own below.
BOOKKEEPING = {
    "auto_mapping": {"base_model_class": "Qwen2ForCausalLM", "parent_library": "transformers"},
    "base_model_name_or_path": "folder/of/the/base",
    "dropout": 0.5,
    "geometry": None,
    "inference_mode": True,
    "peft_type": "PTE",
    "peft_version": "0.1.0",
    "revision": "main",
    "task_type": "CAUSAL_LM",
}


def names_of(config) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def small(base=None, seed=1, **config):
    torch.manual_seed(seed)
    model = get_peft_model(base or fresh(), PteConfig(**{**SMALL, **config}), autocast_adapter_dtype=False).eval()
    randomise_up(model)
    return model


def fresh(**config):
    torch.manual_seed(7)
    return tiny(**config)


@pytest.fixture(scope="module")
def batch():
    return left_padded_batch([5, 3], 12)


@torch.no_grad()
def logps(model, batch):
    return replay_logps(model, *batch, WINDOW)


def test_every_setting_is_in_one_of_the_tables():
    """A field that an upgrade of PEFT brings fails here until it is classed."""
    assert names_of(PteConfig) == CHANGES.keys() | BOOKKEEPING.keys()
    assert names_of(PeftConfig) <= names_of(PteConfig)
    assert names_of(LoraConfig) - names_of(PteConfig) == REFUSED.keys() - {"layers_pattern"} | {
        *("r", "lora_alpha", "lora_dropout", "layers_pattern")
    }
    assert not (REFUSED.keys() | RENAMED.keys()) & names_of(PteConfig)


@pytest.mark.parametrize("key", CHANGES)
def test_a_setting_changes_what_it_says_and_decode_and_replay_still_agree(key, batch):
    usual, changed = small(), small(**{key: CHANGES[key]})
    if key == "modules_to_save":
        with torch.no_grad():
            changed.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.1)
    assert gap(logps(changed, batch), logps(usual, batch)) > 1e-6
    with torch.no_grad():
        assert gap(logps(changed, batch), decode_logps(changed, *batch, WINDOW)) < 1e-6


@pytest.mark.parametrize("key", CHANGES)
def test_a_setting_goes_through_a_file(key, tmp_path, batch):
    model = small(**{key: CHANGES[key]})
    if key == "modules_to_save":
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(), tmp_path)
    assert getattr(loaded.peft_config["default"], key) == getattr(model.peft_config["default"], key)
    assert torch.equal(logps(loaded, batch), logps(model, batch))


def test_all_linear_is_all_seven():
    assert PteConfig(target_modules="all-linear") == PteConfig(target_modules=list(LINEARS))


def where(model) -> set[tuple[int, str]]:
    """(layer, linear) of what is adapted."""
    return {
        (int(key.split("layers.")[1].split(".")[0]), key.rpartition(".")[2])
        for key, module in model.named_modules()
        if isinstance(module, PteLinear)
    }


QO = ("o_proj", "q_proj")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"exclude_modules": ["o_proj"]}, {(n, "q_proj") for n in range(3)}),
        ({"exclude_modules": r".*layers\.[01]\..*"}, {(2, name) for name in QO}),
        ({"layers_to_transform": 1}, {(1, name) for name in QO}),
        (
            {"layers_to_transform": [0, 2], "exclude_modules": ["0.self_attn.q_proj"]},
            {(0, QO[0]), (2, QO[0]), (2, QO[1])},
        ),
    ],
    ids=["a linear", "a pattern", "one layer", "a linear of a layer"],
)
def test_which_linears_are_adapted(config, expected, recwarn):
    model = small(**config)
    assert where(model) == expected
    attentions = [m.base_layer.layer_idx for m in model.modules() if isinstance(m, PteAttention)]
    assert attentions == sorted({layer for layer, _ in expected})  # an encoder without a reader would learn nothing
    assert not [w for w in recwarn if "exclude_modules" in str(w.message)]


def test_modules_to_save_are_trained_switched_off_and_saved(tmp_path, batch):
    model = small(modules_to_save=["lm_head", "norm"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "pte_" not in name}
    assert {name.split(".modules_to_save")[0].rpartition(".")[2] for name in trained} == {
        *("lm_head", "norm", "input_layernorm", "post_attention_layernorm")  # PEFT compares the ends of names
    }
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).mul_(1.1)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(replay_logps(model, *batch, WINDOW), logps(fresh(), batch))
    model.save_pretrained(tmp_path)
    assert torch.equal(logps(PeftModel.from_pretrained(fresh(), tmp_path), batch), logps(model, batch))


def test_bookkeeping(tmp_path, batch):
    """What PEFT writes down or does around an adapter; `geometry` and `dropout` are the last two."""
    given = {**BOOKKEEPING, "geometry": None}
    config = PteConfig(**SMALL, **given)
    config.save_pretrained(tmp_path)
    assert config.revision == "main" and config.base_model_name_or_path == "folder/of/the/base"
    found = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(found, PteConfig) and found == config
    held = json.loads((tmp_path / "adapter_config.json").read_text())
    assert all(held[key] == value for key, value in given.items())
    with pytest.warns(UserWarning, match="was renamed"):  # the base at hand has no name
        model = get_peft_model(fresh(), config)
    assert not any(p.requires_grad for p in model.parameters())  # inference_mode
    assert model.peft_config["default"].geometry["hidden_size"] == 32
    randomise_up(model)
    assert torch.equal(logps(model.eval(), batch), logps(model, batch))
    model.train()
    assert gap(logps(model, batch), logps(model, batch)) > 1e-6  # dropout


@pytest.mark.parametrize("key", sorted(REFUSED | RENAMED))
def test_loras_other_settings_are_refused_by_name(key):
    with pytest.raises(ValueError, match=f"^{key}=8: ") as error:
        PteConfig(**{key: 8})
    assert (f"PteConfig calls it {RENAMED[key]}" if key in RENAMED else REFUSED[key]) in str(error.value)
    assert key not in RENAMED or hasattr(PteConfig(), RENAMED[key])


def test_a_mistyped_setting_is_refused_with_the_list(tmp_path):
    with pytest.raises(TypeError, match=r"'rnk' \(=3\); there are alpha, .*rank, "):
        PteConfig(rnk=3)
    PteConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_a_later_peft": None}))
    with pytest.warns(UserWarning, match="of_a_later_peft"):  # as PEFT does for its own methods
        assert PeftConfig.from_pretrained(tmp_path) == PteConfig()


NUMBERS = [float("nan"), float("inf"), -1, "8", None, [8], True]
BAD = {
    "rank": [*NUMBERS, 0, 2.5, 8.0],
    "num_global_tokens": [*NUMBERS, 0, 2.5],
    "alpha": [*NUMBERS, 0],
    "init_ratio": [*NUMBERS, 0],
    "dropout": [*NUMBERS, 1.0, 1],
    "state_update": ["mean", None, 1],
    "read": ["rows", None],
    "normalisation": ["layer", None],
    "use_global_tokens": [1, "true", None],
    "encode_evicted": [0, "no", None],
    "whiten": ["yes", None],
    "centre": [1, None],
    "write_gate": ["no", None],
    "state_per_head": [2, None],
    "inference_mode": ["yes", 1],
    "target_modules": [[], None, "q_proj", ".*q_proj", ["q_proj", 3], ["q_proj", ""], ["q_proj", "query"], 7, {}],
    "exclude_modules": [[], "", 3, [None]],
    "layers_to_transform": [[], -1, [0, -1], "0", [True], True, 1.0, {}],
    "modules_to_save": [[], "lm_head", [None]],
    "peft_type": ["LORA", 3],
    "task_type": ["SEQ_CLS", "anything"],
    "geometry": [{}, {"hidden_size": 3}, 5],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values], ids=str)
def test_a_bad_value_is_one_sentence_with_key_and_value(key, value):
    with pytest.raises(ValueError, match=f"^{key}=") as error:
        PteConfig(**{key: value})
    sentence = str(error.value)
    assert "\n" not in sentence and len(sentence) < 250
    assert repr(value) in sentence or repr(value[-1]) in sentence


def test_every_setting_has_bad_values():
    free = {"auto_mapping", "base_model_name_or_path", "peft_version", "revision"}  # PEFT's, written down as they are
    assert BAD.keys() == names_of(PteConfig) - free


MISFITS = [
    ({"layers_to_transform": [0, 3]}, r"layers_to_transform=\[0, 3\]: the model has the layers 0 to 2"),
    ({"exclude_modules": ["k_proj"]}, r"exclude_modules=\['k_proj'\]: is none of the linears"),
    ({"exclude_modules": ["layers.1.self_attn"]}, "is none of the linears"),  # a module around them
    ({"exclude_modules": ["q_proj", "o_proj"]}, "nothing is left"),
    ({"modules_to_save": ["head"]}, None),  # the end of lm_head: PEFT takes it
    ({"modules_to_save": ["score"]}, r"modules_to_save=\['score'\]: the model has no module 'score'"),
    ({"modules_to_save": ["q_proj"]}, "'q_proj' is model.layers.0.self_attn.q_proj, which PTE goes into"),
    ({"modules_to_save": ["mlp"]}, "'mlp' is model.layers.0.mlp, which PTE goes into"),
    ({"modules_to_save": ["model"]}, "'model' is model, which PTE goes into"),
]


@pytest.mark.parametrize(("config", "message"), MISFITS, ids=str)
def test_modules_that_the_model_does_not_have_leave_it_untouched(config, message):
    base = fresh()
    before = [name for name, _ in base.named_modules()]
    if message is None:
        small(base, **config)
        return
    with pytest.raises(ValueError, match=message):
        small(base, **config)
    assert [name for name, _ in base.named_modules()] == before


def test_a_linear_of_another_kind_is_refused_before_anything_is_changed():
    base = fresh()
    base.model.layers[2].self_attn.o_proj = torch.nn.Identity()
    with pytest.raises(
        ValueError, match=r"model\.layers\.2\.self_attn\.o_proj is torch\.nn\.modules\.linear\.Identity; PTE adapts"
    ):
        small(base)
    assert not any(isinstance(m, PteAttention | PteLinear) for m in base.modules())
