"""Incomplete model folders: each is refused by its headers, in one sentence, before any weight is loaded."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

from pte_trl import PteConfig
from pte_trl.adapter.check import expected_shapes
from pte_trl.models.weights import check_loaded, check_model_folder
from tests.models import FAMILIES, tiny

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """save(family, tied, parts) -> the bytes of a saved model's files; every model is made once."""
    made = {}

    def save(family="llama", tied=False, parts=1):
        key = (family, tied, parts)
        if key not in made:
            folder = tmp_path_factory.mktemp("saved")
            model = tiny(family, torch.float32, tie_word_embeddings=tied, num_hidden_layers=2)
            model.save_pretrained(folder, max_shard_size="5GB" if parts == 1 else "40KB")
            made[key] = {path.name: path.read_bytes() for path in folder.iterdir()}
        return made[key]

    return save


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^model_name_or_path='{folder}': .*{message}") as raised:
        check_model_folder(str(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_whole_folder_passes(saved, tmp_path, family, tied, parts):
    files = saved(family, tied, parts)
    assert (INDEX in files) == (parts == 2)
    check_model_folder(str(put(tmp_path / "model", files)))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    check_loaded(info, "model")


def test_another_architecture_and_an_old_format_pass(tmp_path):
    """GPT2 ties, and its checkpoints on the hub lack the prefix of the base model."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    model.save_pretrained(tmp_path)
    check_model_folder(str(tmp_path))
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / SINGLE).items()}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    check_model_folder(str(tmp_path))
    (tmp_path / SINGLE).unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    check_model_folder(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, r"pytorch_model\.bin is empty")


def test_a_hub_name_is_left_to_the_download():
    check_model_folder("org/model")


CONFIGS = [
    (None, r"holds no config\.json; holds generation_config\.json, model\.safetensors"),
    ("", r"config\.json is not JSON"),
    ("{", r"config\.json is not JSON"),
    ("[]", r"config\.json names no model_type"),
    ("{}", r"config\.json names no model_type"),
    ('{"model_type": 5}', r"config\.json names no model_type"),
    ('{"model_type": "nothing-like-it"}', r"config\.json cannot be used \(ValueError: .*nothing-like-it"),
]


@pytest.mark.parametrize(("content", "message"), CONFIGS)
def test_the_configuration(saved, tmp_path, content, message):
    folder = put(tmp_path / "model", saved())
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    refused(folder, message)


SHAPES = [
    ({"vocab_size": 80}, r"model\.embed_tokens\.weight has shape \[64, 32\], config\.json says \[80, 32\]|lm_head"),
    ({"hidden_size": 40}, r"has shape \[.*\], config\.json says \["),
    ({"intermediate_size": 50}, r"mlp\.\w+\.weight has shape"),
    ({"num_key_value_heads": 1}, r"self_attn\.[kv]_proj\.weight has shape \[16, 32\], config\.json says \[8, 32\]"),
    ({"num_hidden_layers": 3}, r"its weights lack 9 \(model\.layers\.2\.\w+.*, \.\.\.\) of \d+ tensors"),
    ({"num_attention_heads": 0}, "no model can be built from config|config.json cannot be used"),
    ({"hidden_size": "wide"}, r"no model can be built from config\.json|config\.json cannot be used"),
    ({"hidden_act": "nonsense"}, r"no model can be built from config\.json|config\.json cannot be used"),
]


@pytest.mark.parametrize(("change", "message"), SHAPES)
def test_a_configuration_of_another_model(saved, tmp_path, change, message):
    folder = put(tmp_path / "model", saved())
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, message)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_but_a_tied_one_must_be_there(saved, tmp_path, family, tied):
    """One by one: none can be left out, in any family; of two tied ones either is enough."""
    folder = put(tmp_path / "model", saved(family, tied))
    whole = load_file(folder / SINGLE)
    assert ("lm_head.weight" in whole) == (not tied)
    for name in [name for name in whole if "layers.1." not in name]:
        save_file({key: tensor for key, tensor in whole.items() if key != name}, folder / SINGLE)
        refused(folder, rf"its weights lack \d \({name}")
    if tied:
        whole["lm_head.weight"] = whole.pop("model.embed_tokens.weight")
        save_file(whole, folder / SINGLE)
        check_model_folder(str(folder))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_file_that_is_cut_anywhere(saved, tmp_path, parts):
    files = saved(parts=parts)
    for name in [name for name in files if name.endswith(".safetensors")]:
        content = files[name]
        header = struct.unpack("<Q", content[:8])[0]
        for size in (0, 7, 8, 9, 8 + header // 2, 8 + header, len(content) - 1):
            refused(put(tmp_path / "model", files | {name: content[:size]}), rf"{name} is cut short")
        longer = put(tmp_path / "model", files | {name: content + b"\0"})
        refused(longer, rf"{name} is longer than its header says: \d+ bytes instead of \d+")
        refused(
            put(tmp_path / "model", files | {name: b"\xff" * 8 + content[8:]}), "cut short, or no safetensors file"
        )
        other = content[:8] + b"x" * header + content[8 + header :]
        refused(put(tmp_path / "model", files | {name: other}), rf"the header of {name} is damaged")
        put(tmp_path / "model", files)


def test_a_header_that_lies(saved, tmp_path):
    content = saved()[SINGLE]
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [31]
    text = json.dumps(header).encode()
    folder = put(tmp_path / "model", saved() | {SINGLE: struct.pack("<Q", len(text)) + text + content[8 + length :]})
    refused(folder, r"the header of model\.safetensors is damaged \(model\.norm\.weight has 128 bytes for")


def test_files_that_are_not_there(saved, tmp_path):
    files = saved(parts=2)
    parts = sorted(name for name in files if name.endswith(".safetensors"))
    folder = put(tmp_path / "model", files)
    (folder / parts[0]).unlink()
    refused(folder, rf"{INDEX} names {len(parts)} files, of which 1 are missing \({parts[0]}\)")
    (folder / INDEX).unlink()
    refused(
        folder, r"holds no weights \(model\.safetensors, or model\.safetensors\.index\.json and its parts\); holds c"
    )
    for bad in ("", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {}}'):
        refused(put(tmp_path / "model", files | {INDEX: bad.encode()}), "is damaged|names 0 files")
    index = json.loads(files[INDEX])
    moved = next(name for name, part in index["weight_map"].items() if part == parts[0])
    index["weight_map"][moved] = parts[1]
    wrong = put(tmp_path / "model", files | {INDEX: json.dumps(index).encode()})
    refused(wrong, rf"{parts[1]} lacks 1 \({moved}\), which {INDEX} says it holds")


def test_what_transformers_reports_is_an_error(saved, tmp_path):
    """Fewer layers than the checkpoint has: nothing is missing, and yet it is another model."""
    folder = put(tmp_path / "model", saved())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    check_model_folder(str(folder))
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with pytest.raises(ValueError, match=r"^model_name_or_path='x': of its weights 9 \(model\.layers\.1.* are no"):
        check_loaded(info, "x")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with pytest.raises(ValueError, match=r"9 \(model\.layers\.2\.input_layernorm\.weight, .*\) are missing"):
        check_loaded(info, "x")
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match=r"6 \(model\.layers\.0\.mlp.* have another shape"):
        check_loaded(info, "x")


def test_a_model_is_looked_at_under_zero3_too(saved, tmp_path):
    put(tmp_path / "model", saved())
    held = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        assert held.is_zero3()
        check_model_folder(str(tmp_path / "model"))
        config = AutoConfig.from_pretrained(tmp_path / "model")
        assert expected_shapes(PteConfig(rank=2, num_global_tokens=2), config)[0]
    finally:
        unset_hf_deepspeed_config()
