"""Models that also see, trained on text alone: the window, the adapter and the estimate are of the language model."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3Config, GptOssConfig, LlamaConfig

from experiments.tiny.model import build_tokenizer
from pte_trl.adapter.text_part import text_only
from pte_trl.models.attention import eager_alone, usable_attention
from pte_trl.models.weights import without_memory
from pte_trl.training.given import check_targets
from tests.test_trainer import logged, trainer_for

TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
TEXT |= {"intermediate_size": 48, "vocab_size": len(build_tokenizer()), "sliding_window": 8}
TEXT |= {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def seeing(**options):
    return AutoModelForCausalLM.from_config(Gemma3Config(text_config=TEXT, vision_config=VISION), **options)


@pytest.mark.parametrize("method", ["lora_c", "pte"])
def test_a_model_that_also_sees_trains_on_text(tmp_path, method, capsys):
    torch.manual_seed(0)
    model = seeing(attn_implementation="blockwise")
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    trainer = trainer_for(tmp_path, method, model=model, max_steps=1, beta=0.1)
    trainer.train()
    assert logged(trainer, "mismatch/max")[0] < 1e-3
    assert logged(trainer, "rollout/evictions")[0] > 0
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and not any("vision" in name for name in trained)
    assert "GB per process, estimated" in capsys.readouterr().out


def adapted(adapter: LoraConfig, model) -> set[str]:
    return {key.removeprefix("base_model.model.") for key in get_peft_model(model, adapter).targeted_module_names}


@pytest.mark.parametrize("excluded", [None, ["1.self_attn.q_proj", "fc2"], r".*layers\.1\..*"], ids=repr)
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], "all-linear", r".*\.(q_proj|up_proj|fc1)"], ids=repr)
def test_adapters_of_peft_lie_in_the_language_model(targets, excluded):
    asked = LoraConfig(target_modules=targets, exclude_modules=excluded, task_type="CAUSAL_LM")
    before = copy.deepcopy(asked)
    with without_memory():
        narrowed = text_only(asked, seeing())
        found, every = adapted(narrowed, seeing()), adapted(copy.deepcopy(asked), seeing())
    assert found == {name for name in every if name.startswith(("model.language_model.", "lm_head"))} < every
    assert found and asked == before


def test_a_target_outside_of_the_language_model_is_refused_before_weights_load():
    config = Gemma3Config(text_config=TEXT, vision_config=VISION)
    adapter = LoraConfig(target_modules=["fc1"], task_type="CAUSAL_LM")
    check_targets("lora", adapter, config, False)
    with pytest.raises(ValueError, match=r"^target_modules=\['fc1'\]: "):
        check_targets("lora_c", adapter, config, False)


def test_where_nothing_else_is_the_adapter_is_left_as_it_is():
    adapter = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with without_memory():
        assert text_only(adapter, AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1))) is adapter


def test_lora_is_left_as_peft_does_it(tmp_path):
    trainer = trainer_for(tmp_path, "lora", model=seeing(attn_implementation="eager"))
    assert any("vision" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


def test_the_attention_that_a_model_needs_is_printed_once(capsys):
    assert usable_attention("blockwise", LlamaConfig()) == "blockwise" and eager_alone(LlamaConfig()) is None
    assert not capsys.readouterr().out
    for config, why in ((Gemma2Config(), "attn_logit_softcapping=50"), (GptOssConfig(), "no SDPA for gpt_oss")):
        assert usable_attention("eager", config) == usable_attention("sdpa", config, quiet=True) == "eager"
        assert not capsys.readouterr().out
        assert usable_attention("blockwise", config) == "eager"
        assert why in capsys.readouterr().out
