"""The paper's three models by their configurations alone: PTE fits them, without their weights."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import pte_trl
from pte_trl.adapter.model import pte_layers
from pte_trl.training.arguments import parse_recipe
from pte_trl.training.loading import check_fits

ROOT = Path(__file__).resolve().parent.parent
SHAPES = Path(pte_trl.__file__).parent / "estimate/shapes"
# Billions of parameters as their makers state them, and the recipe of each. The small two take the 3B model's.
MODELS = {"qwen2.5-3b": (3.09, "qwen3b"), "qwen2.5-7b": (7.61, "qwen7b"), "llama-8b": (8.03, "llama8b")}
MODELS |= {"qwen2.5-0.5b": (0.49, "qwen3b"), "qwen2.5-1.5b": (1.54, "qwen3b")}


@pytest.mark.parametrize("shape", MODELS)
def test_the_shape_is_the_published_one_and_takes_the_recipes_adapter(shape):
    billions, recipe = MODELS[shape]
    config = AutoConfig.from_pretrained(SHAPES / shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)
        script, args = parse_recipe(
            ["--config", str(ROOT / f"recipes/{recipe}.yaml"), "--use_cpu", "true", "--bf16", "0"]
        )
        adapted = get_peft_model(model, script.adapter_config(args.method))
    assert len(pte_layers(adapted)) == config.num_hidden_layers
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trainable < 0.04 * billions * 1e9
    check_fits(script, args, config)
