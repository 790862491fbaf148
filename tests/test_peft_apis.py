"""What users of PEFT and of transformers call on an adapter: it works for PTE, or is refused in one sentence."""

import copy
import io
import json
import pickle
from functools import partial

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PeftType,
    convert_to_lora,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast, pipeline

from pte_trl import BoundedCache, PteConfig
from pte_trl.adapter import PteAttention, PteLinear
from pte_trl.adapter.peft_type import PTE, add_member
from tests.models import VOCAB, left_padded_batch, replay_logps, tiny, with_lora, with_pte

WINDOW = 6
BATCH = left_padded_batch([5, 3], 12)


@torch.no_grad()
def logps(model):
    return replay_logps(model.eval(), *BATCH, WINDOW)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, two adapters of it, and what both give."""
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(7)
    tiny(dtype=torch.float32).save_pretrained(root / "base")
    expected = {"base": logps(load_base(root))}
    for name, config in {"a": {"whiten": True}, "b": {"read": "column", "target_modules": "all-linear"}}.items():
        model = with_pte(load_base(root), seed=len(expected), **config)
        model.save_pretrained(root / name)
        expected[name] = logps(model)
    return root, expected


def tokenizer():
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(VOCAB)}))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")


def pipe(root):
    return pipeline("text-generation", model=str(root / "a"), tokenizer=tokenizer(), dtype=torch.float32)


def load_base(root, **kwargs):
    return AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32, **kwargs)


# ---- the enum --------------------------------------------------------------------------------------------------


def test_pte_is_a_member_of_pefts_enum():
    """What `pte_trl/adapter/peft_type.py` promises, by every way that the standard library offers to a member."""
    assert isinstance(PTE, PeftType) and PTE is PeftType.PTE is PeftType["PTE"] is PeftType("PTE")
    assert PTE == "PTE" and PTE.value == PTE.name == "PTE" and str(PTE) == "PeftType.PTE"
    assert PTE in PeftType and PTE in list(PeftType) and "PTE" in PeftType.__members__
    assert {PTE: 1}["PTE"] == 1 and PTE != PeftType.LORA and len(set(PeftType)) == len(PeftType)
    assert pickle.loads(pickle.dumps(PTE)) is PTE is copy.deepcopy(PTE)
    assert json.dumps(PTE) == '"PTE"'
    assert add_member(PeftType, "PTE") is PTE and PeftType("LORA") is PeftType.LORA
    with pytest.raises(AttributeError):
        PeftType.PTE = "something else"


@pytest.mark.parametrize("there_and_back", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_config_is_copied_and_pickled_whole(there_and_back):
    config = PteConfig(rank=3, layers_to_transform=1)
    assert there_and_back(config) == config and there_and_back(config).peft_type is PTE


def test_without_the_import_peft_names_the_method_it_misses(folders, monkeypatch):
    """A PTE adapter needs `import pte_trl`; what PEFT says without it."""
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, PTE)
    with pytest.raises(KeyError, match="PTE"):
        PeftConfig.from_pretrained(folders[0] / "a")


# ---- loading ---------------------------------------------------------------------------------------------------


def by_transformers(root, **kwargs):
    model = load_base(root)
    model.load_adapter(str(root / "a"), **kwargs)
    return model


LOADERS = {
    "PeftModel": lambda root: PeftModel.from_pretrained(load_base(root), root / "a"),
    "PeftModel, low_cpu_mem_usage": lambda root: PeftModel.from_pretrained(
        load_base(root), root / "a", low_cpu_mem_usage=True
    ),
    "PeftModel on a device map": lambda root: PeftModel.from_pretrained(
        load_base(root, device_map={"": "cpu"}), root / "a", device_map={"": "cpu"}
    ),
    "AutoPeftModelForCausalLM": lambda root: AutoPeftModelForCausalLM.from_pretrained(root / "a", dtype=torch.float32),
    "AutoModelForCausalLM": lambda root: AutoModelForCausalLM.from_pretrained(root / "a", dtype=torch.float32),
    "load_adapter of transformers": by_transformers,
    "the same, to train": partial(by_transformers, is_trainable=True),
    "pipeline": lambda root: pipe(root).model,
}


@pytest.mark.parametrize("load", LOADERS)
def test_every_way_to_load_gives_the_same_model(load, folders):
    root, expected = folders
    model = LOADERS[load](root)
    assert torch.equal(logps(model), expected["a"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert bool(trained) == ("train" in load) and not any("whitener" in name for name in trained)


def test_a_pipeline_writes_what_generate_writes(folders):
    root, _ = folders
    found = pipe(root)("w5 w6 w7", max_new_tokens=10, do_sample=False, past_key_values=BoundedCache(4))
    model = PeftModel.from_pretrained(load_base(root), root / "a").eval()
    ids, options = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 10, "do_sample": False}
    written = model.generate(input_ids=ids, past_key_values=BoundedCache(4), **options)
    text = found[0]["generated_text"]  # the pipeline joins question and answer without a space
    assert text.replace(" ", "") == tokenizer().decode(written[0]).replace(" ", "")
    assert written.shape[1] == 13


def test_transformers_own_adapter_methods(folders):
    root, expected = folders
    model = load_base(root)
    model.load_adapter(str(root / "a"), adapter_name="a")
    model.load_adapter(str(root / "b"), adapter_name="b")
    for name in "aba":
        model.set_adapter(name)
        assert model.active_adapters() == [name] and torch.equal(logps(model), expected[name])
    model.disable_adapters()
    assert torch.equal(logps(model), expected["base"])
    model.enable_adapters()
    saved = load_file(root / "a" / "adapter_model.safetensors")
    found = model.get_adapter_state_dict("a")
    assert {"base_model.model." + name for name in found} == saved.keys()
    with pytest.warns(UserWarning, match="a was active"):
        model.delete_adapter("a")
    assert torch.equal(logps(model), expected["b"])
    model.delete_adapter("b")
    assert torch.equal(logps(model), expected["base"])
    assert not any("pte_" in name for name, _ in model.named_parameters())
    model.add_adapter(PteConfig(rank=3), "fresh")
    assert torch.equal(logps(model), expected["base"])  # untrained: exactly the base


def test_inject_and_the_state_dict_functions(folders):
    root, expected = folders
    model = inject_adapter_in_model(PeftConfig.from_pretrained(root / "a"), load_base(root), low_cpu_mem_usage=True)
    state = load_file(root / "a" / "adapter_model.safetensors")
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    assert torch.equal(logps(model), expected["a"])
    keys = {name.removeprefix("base_model.model.") for name in state}
    assert get_peft_model_state_dict(model).keys() == keys
    config = PteConfig(rank=5, num_global_tokens=6, alpha=5.0, read="column", target_modules="all-linear")
    state = {
        k.removeprefix("base_model.model."): v for k, v in load_file(root / "b/adapter_model.safetensors").items()
    }
    by_state = inject_adapter_in_model(config, load_base(root), state_dict=state)
    set_peft_model_state_dict(by_state, state)
    assert torch.equal(logps(by_state), expected["b"])


def test_a_half_loaded_adapter_is_an_error_and_not_a_warning(folders):
    root, _ = folders
    state = load_file(root / "a" / "adapter_model.safetensors")
    half = dict(list(state.items())[::2])
    model = with_pte(load_base(root), whiten=True)
    with pytest.raises(
        ValueError, match=rf"{len(state) - len(half)} of the {len(state)} tensors of adapter 'default'"
    ):
        set_peft_model_state_dict(model, half)


def test_saved_modules_that_transformers_would_leave_out_are_refused(folders, tmp_path):
    root, _ = folders
    with_pte(load_base(root), modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    PeftModel.from_pretrained(load_base(root), tmp_path)
    with pytest.raises(ValueError, match=r"modules_to_save=\['lm_head'\]: transformers' from_pretrained"):
        load_base(root).load_adapter(str(tmp_path))


# ---- what PEFT tells ----------------------------------------------------------------------------------------------


def test_status_and_model_card(folders, tmp_path):
    root, _ = folders
    model = PeftModel.from_pretrained(load_base(root), root / "a", adapter_name="first")
    model.load_adapter(root / "b", adapter_name="second")
    status = get_model_status(model)
    assert status.peft_types == {"first": "PTE", "second": "PTE"} and status.active_adapters == ["first"]
    assert status.available_adapters == ["first", "second"] and status.enabled is True
    layers = get_layer_status(model)
    assert {layer.module_type for layer in layers} == {"PteAttention", "PteLinear"} and len(layers) == 3 * 8
    assert get_model_status(by_transformers(root)).available_adapters == ["default"]
    model.create_or_update_model_card(str(tmp_path))
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both/first/adapter_config.json").is_file()
    assert torch.equal(logps(PeftModel.from_pretrained(load_base(root), tmp_path / "both/second")), folders[1]["b"])


def test_an_adapter_is_loaded_again_over_itself(folders):
    """As the Trainer does for its best checkpoint."""
    root, expected = folders
    model = PeftModel.from_pretrained(load_base(root), root / "a", is_trainable=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    model.load_adapter(root / "a", "default", is_trainable=True)
    assert torch.equal(logps(model), expected["a"]) and any(p.requires_grad for p in model.parameters())


def test_an_average_of_weights_follows_training(folders):
    root, expected = folders
    model = PeftModel.from_pretrained(load_base(root), root / "a", is_trainable=True)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        replay_logps(model, *BATCH, WINDOW).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    assert not torch.equal(logps(average.module), logps(model))
    assert not torch.equal(logps(average.module), expected["a"])


# ---- what is refused -------------------------------------------------------------------------------------------


def call_with_names(root, method):
    model = PeftModel.from_pretrained(load_base(root), root / "a")
    getattr(model, method)(input_ids=BATCH[0], adapter_names=["default", "__base__"])


def hotswap_of_transformers(root):
    model = by_transformers(root)
    model.load_adapter(str(root / "b"), adapter_name="default", hotswap=True)


ON_DISK = {"model.layers.1": "disk", "model.layers.0": "cpu", "model.layers.2": "cpu"}
ON_DISK |= dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
REFUSALS = {
    "hotswap": (
        lambda root: hotswap_adapter(
            PeftModel.from_pretrained(load_base(root), root / "a"), str(root / "b"), "default"
        ),
        "Hotswapping only supports LORA but PTE was passed",
    ),
    "hotswap of transformers": (hotswap_of_transformers, "Hotswapping is currently only supported for LoRA"),
    "mixed": (
        lambda root: PeftMixedModel(load_base(root), PteConfig()),
        "'PTE' is not compatible with the `PeftMixed",
    ),
    "mixed, by argument": (lambda root: get_peft_model(load_base(root), PteConfig(), mixed=True), "not compatible"),
    "weighted": (
        lambda root: with_pte(load_base(root)).add_weighted_adapter(["default"], [1.0], "sum"),
        "PTE adapters cannot be added up",
    ),
    "adapter_names": (lambda root: call_with_names(root, "forward"), "one PTE adapter serves a whole batch"),
    "adapter_names of generate": (lambda root: call_with_names(root, "generate"), "one PTE adapter serves a whole"),
    "conversion to LoRA": (
        lambda root: convert_to_lora(with_pte(load_base(root)), rank=2),
        "do not support LoRA conversion",
    ),
    "LoRA beside it": (
        lambda root: with_pte(load_base(root)).add_adapter("lora", LoraConfig(target_modules=["q_proj"])),
        "Cannot combine adapters with different peft types",
    ),
    "on LoRA": (
        lambda root: get_peft_model(with_lora(load_base(root)), PteConfig()),
        r"layers\.0\.self_attn\.q_proj is peft\.tuners\.lora\.layer\.Linear; PTE adapts torch\.nn\.Linear alone",
    ),
    "no causal language model": (
        lambda root: get_peft_model(
            AutoModelForSequenceClassification.from_pretrained(root / "base", pad_token_id=0), PteConfig()
        ),
        "Qwen2ForSequenceClassification: PTE adapts causal language models",
    ),
    "weights on disk": (
        lambda root: PeftModel.from_pretrained(
            load_base(root, device_map=ON_DISK, offload_folder=root / "offloaded"), root / "a"
        ),
        r"device_map: model\.layers\.1\.self_attn\.q_proj\.weight is offloaded",
    ),
    "merge": (lambda root: with_pte(load_base(root)).merge_and_unload(), "cannot be merged"),
    "merge, kept": (lambda root: with_pte(load_base(root)).merge_adapter(), "cannot be merged"),
}


@pytest.mark.filterwarnings("ignore:You are trying to modify")
@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_work_is_refused(what, folders):
    call, message = REFUSALS[what]
    with pytest.raises((ValueError, TypeError), match=message):
        call(folders[0])


# ---- copies ------------------------------------------------------------------------------------------------------


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "torch.save": saved_and_loaded,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "AveragedModel": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("when", ["before", "after a forward", "after a step", "after decoding"])
def test_a_model_is_copied_at_any_time(how, when):
    torch.manual_seed(7)
    model = with_pte(tiny(num_hidden_layers=1), target_modules="all-linear")
    loss = None
    if when != "before":
        loss = replay_logps(model, *BATCH, WINDOW).square().mean()
    if when == "after a step":
        loss.backward()
    if when == "after decoding":
        model.generate(input_ids=BATCH[0][:, :5], max_new_tokens=9, past_key_values=BoundedCache(WINDOW))
    copied = COPIES[how](model)
    assert torch.equal(logps(copied), logps(model))
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if "pte_up" in name:
                parameter.zero_()
    assert not torch.equal(logps(copied), logps(model))  # nothing is shared
    unloaded = copied.unload()  # all of it came along, also what is needed to go
    assert not any(isinstance(m, PteAttention | PteLinear) or m._forward_hooks for m in unloaded.modules())
