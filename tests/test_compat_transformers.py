"""What the private names of transformers must do (`pte_trl/compat/transformers.py`)."""

import functools
import json
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    MistralConfig,
    Qwen2Config,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from pte_trl.compat import engines, transformers
from tests.compat_names import about
from tests.models import FAMILIES, tiny


def arguments(tmp_path, **settings) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **settings)


@about("transformers.commit_of")
def test_the_commit_of_a_configuration(tmp_path, monkeypatch):
    repository = tmp_path / "models--org--model"
    for commit, revision in (("a" * 40, "main"), ("b" * 40, "other")):
        tiny(dtype=torch.float32).save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision, commit in ((None, "a"), ("other", "b"), ("b" * 40, "b")):
        options = {} if revision is None else {"revision": revision}
        loaded = AutoModelForCausalLM.from_pretrained("org/model", **options)
        assert transformers.commit_of(loaded.config) == commit * 40
    assert transformers.commit_of(tiny().config) is None


@about("transformers.PREFIX_CHECKPOINT_DIR")
def test_a_checkpoints_folder(tmp_path):
    (tmp_path / f"{transformers.PREFIX_CHECKPOINT_DIR}-3").mkdir()
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / f"{transformers.PREFIX_CHECKPOINT_DIR}-3")


@about(*(f"transformers.{name}" for name in transformers.__all__ if "WEIGHTS" in name))
def test_the_files_of_weights(tmp_path):
    model = tiny(dtype=torch.float32)
    model.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / transformers.SAFE_WEIGHTS_NAME).is_file()
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert (tmp_path / "parts" / transformers.SAFE_WEIGHTS_INDEX_NAME).is_file()
    for kind, name in (("old", transformers.WEIGHTS_NAME), ("old parts", "part.bin")):
        model.config.save_pretrained(tmp_path / kind)
        torch.save(model.state_dict(), tmp_path / kind / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), "part.bin")}
    (tmp_path / "old parts" / transformers.WEIGHTS_INDEX_NAME).write_text(json.dumps(index))
    for kind in ("whole", "parts", "old", "old parts"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / kind).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items()), kind


@about("transformers.attention_of", "transformers.is_flash_attention_requested")
def test_the_attention_in_use_is_read_from_the_configuration():
    model = tiny()
    for name in ("eager", "sdpa", "blockwise", "blockwise_flex"):
        model.set_attn_implementation(name)
        assert transformers.attention_of(model.config) == name
        assert not transformers.is_flash_attention_requested(model.config)
    assert transformers.attention_of(None) is None
    flash = SimpleNamespace(_attn_implementation="flash_attention_2")
    assert transformers.is_flash_attention_requested(flash)


@about("transformers.decoder_classes")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_a_decoder(family):
    model = tiny(family)
    layer = model.model.layers[0]
    parts = (layer, layer.self_attn, layer.mlp, layer.input_layernorm)
    assert transformers.decoder_classes(type(model)) == tuple(map(type, parts))


@about("transformers.layer_types")
def test_kinds_of_layers():
    assert transformers.layer_types(Qwen2Config(num_hidden_layers=2)) == ["full_attention"] * 2
    assert transformers.layer_types(MistralConfig(num_hidden_layers=2, sliding_window=8)) == ["sliding_attention"] * 2


@about("transformers.set_zero3_state")
def test_a_model_without_memory_is_no_matter_of_zero3(tmp_path):
    """Under ZeRO-3 a model is divided as it is made; inside, it stays whole on the meta device."""
    settings = arguments(tmp_path, deepspeed={"zero_optimization": {"stage": 3}, "train_batch_size": "auto"})
    try:
        with torch.device("meta"), transformers.set_zero3_state():
            model = AutoModelForCausalLM.from_config(Qwen2Config(hidden_size=32, num_hidden_layers=1, vocab_size=8))
        assert all(p.is_meta and p.numel() for p in model.parameters())
    finally:
        del settings.hf_deepspeed_config  # while it is there, transformers takes ZeRO-3 to be on


@about("transformers.tied_weights")
def test_tied_weights_by_name():
    assert transformers.tied_weights(tiny(tie_word_embeddings=True)) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert transformers.tied_weights(tiny(tie_word_embeddings=False)) == {}


@about("transformers.unquantised")
def test_what_was_quantised_is_forgotten():
    config = Qwen2Config(quantization_config={"quant_method": "gguf"})
    config._pre_quantization_dtype = torch.float32
    assert transformers.unquantised(config) is config
    assert config.to_dict() == Qwen2Config().to_dict()
    assert transformers.unquantised(config) is config


@about("transformers.without_checkpointing")
def test_checkpointing_is_off_inside_and_as_before_behind():
    model = tiny().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = list(model.model.layers)
    functions = [layer._gradient_checkpointing_func for layer in layers]
    with pytest.raises(KeyError), transformers.without_checkpointing(model) as found:
        assert found == layers and not model.is_gradient_checkpointing
        raise KeyError
    assert model.is_gradient_checkpointing and all(layer.gradient_checkpointing for layer in layers)
    assert [layer._gradient_checkpointing_func for layer in layers] == functions


@about("transformers.wrap_decoding_loops", "transformers.SAMPLE")
def test_generate_goes_through_the_wrapped_loop(monkeypatch):
    seen, before = {}, {}

    def wrap(name, loop):
        before[name] = loop
        monkeypatch.setattr(GenerationMixin, name, loop)  # put back at the end

        @functools.wraps(loop)
        def watched(*args, **kwargs):
            seen[name] = signature(loop).bind(*args, **kwargs).arguments
            return loop(*args, **kwargs)

        return watched

    transformers.wrap_decoding_loops(wrap)
    assert {transformers.SAMPLE, transformers.BEAM_SEARCH, "generate_batch"} <= set(before)
    ids = torch.tensor([[3, 4, 5]])
    tiny().generate(ids, max_new_tokens=2, do_sample=False)
    (call,) = seen.values()
    assert list(seen) == [transformers.SAMPLE] and torch.equal(call["input_ids"], ids)
    assert call["generation_config"].max_new_tokens == 2
    (others,) = [value for value in call.values() if isinstance(value, dict)]
    assert {"past_key_values", "attention_mask"} <= set(others)


@about("transformers.template_variables")
def test_variables_of_a_template_with_transformers_own_tags():
    template = "{% generation %}{{ messages }}{% endgeneration %}{% if enable_thinking %}x{% endif %}"
    assert {"messages", "enable_thinking"} <= transformers.template_variables(template)


@about("transformers.tracker_callbacks")
def test_trackers_by_name():
    known = transformers.tracker_callbacks()
    assert {"wandb", "tensorboard", "trackio"} <= set(known)
    assert all(issubclass(each, TrainerCallback) for each in known.values())
    with pytest.raises((RuntimeError, ImportError)):
        known["comet_ml"]()  # not installed here


@about("transformers.zero_stage_of", "engines.launched_zero_stage")
def test_the_stage_that_a_recipe_asks_for(tmp_path):
    assert transformers.zero_stage_of(arguments(tmp_path)) is None
    assert engines.launched_zero_stage(arguments(tmp_path)) is None
    asking = arguments(tmp_path, deepspeed={"zero_optimization": {"stage": 2}, "train_batch_size": "auto"})
    assert transformers.zero_stage_of(asking) == engines.launched_zero_stage(asking) == 2


@about("transformers.fsdp_version_of")
def test_the_version_of_fsdp_that_a_recipe_asks_for(tmp_path):
    assert transformers.fsdp_version_of(arguments(tmp_path)) is None
    settings = {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2, "version": 2}}
    assert transformers.fsdp_version_of(arguments(tmp_path, **settings)) == 2
