"""What we rely on in the libraries beneath us, so that an upgrade fails here and not in a run."""

import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers.cache_utils import Cache, CacheLayerMixin
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

ROOT = Path(__file__).resolve().parent.parent
PINS = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("package", "pinned"), PINS)
def test_installed_is_what_is_pinned(package, pinned):
    assert version(package).split("+")[0] == pinned


def test_every_requirement_is_pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert len(PINS) == sum(bool(line.strip()) and not line.startswith("#") for line in lines)


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_methods_of_trl_that_we_replace():
    assert parameters(GRPOTrainer._generate_single_turn)[:5] == [
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
    ]
    assert parameters(GRPOTrainer._get_per_token_logps_and_entropies)[:8] == [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
    ]
    assert parameters(GRPOTrainer._compute_loss) == ["self", "model", "inputs"]
    assert parameters(GRPOTrainer._generate_and_score_completions) == ["self", "inputs"]
    assert parameters(add_fused_lm_head)[:2] == ["model", "temperature"]


def test_the_names_inside_trl_that_we_read():
    source = inspect.getsource(GRPOTrainer)
    for name in ("sampling_per_token_logps", "old_per_token_logps", "frac_reward_zero_std", "eos_token_ids"):
        assert name in source
    assert "ref" in inspect.getsource(GRPOTrainer.__init__)
    assert 'use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None)' in source


def test_the_cache_interface_of_transformers():
    for name in ("get_mask_sizes", "get_seq_length", "get_query_offset", "update", "reorder_cache", "crop"):
        assert callable(getattr(Cache, name))
    assert CacheLayerMixin.__abstractmethods__ <= {
        "lazy_initialization",
        "update",
        "get_mask_sizes",
        "get_seq_length",
        "get_max_length",
    }
