"""Models that also see, trained on text alone: the window, the adapter and the estimate are of the language model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3Config, GptOssConfig, LlamaConfig

from experiments.tiny.model import build_tokenizer
from pte_trl.models.attention import eager_alone, usable_attention
from tests.test_trainer import logged, trainer_for

TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
TEXT |= {"intermediate_size": 48, "vocab_size": len(build_tokenizer()), "sliding_window": 8}
TEXT |= {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("method", ["lora_c", "pte"])
def test_a_model_that_also_sees_trains_on_text(tmp_path, method, capsys):
    torch.manual_seed(0)
    config = Gemma3Config(text_config=TEXT, vision_config=VISION)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="blockwise")
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    trainer = trainer_for(tmp_path, method, model=model, max_steps=1, beta=0.1)
    trainer.train()
    assert logged(trainer, "mismatch/max")[0] < 1e-3
    assert logged(trainer, "rollout/evictions")[0] > 0
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and not any("vision" in name for name in trained)
    assert "GB per process, estimated" in capsys.readouterr().out


def test_the_attention_that_a_model_needs_is_printed_once(capsys):
    assert usable_attention("blockwise", LlamaConfig()) == "blockwise" and eager_alone(LlamaConfig()) is None
    assert not capsys.readouterr().out
    for config, why in ((Gemma2Config(), "attn_logit_softcapping=50"), (GptOssConfig(), "no SDPA for gpt_oss")):
        assert usable_attention("eager", config) == usable_attention("sdpa", config, quiet=True) == "eager"
        assert not capsys.readouterr().out
        assert usable_attention("blockwise", config) == "eager"
        assert why in capsys.readouterr().out
