"""What users import: these names at the top and no other, at little cost, and what importing the package registers."""

import importlib
import json
import subprocess
import sys

import pytest

import pte_trl

NAMES = {
    "AccuracyReward",
    "BoundedCache",
    "CachePolicy",
    "PteConfig",
    "PteDistillConfig",
    "PteDistillationTrainer",
    "PteGRPOConfig",
    "PteGRPOTrainer",
    "rollout",
}
LIMIT = 2.0  # s of CPU time beyond TRL's own import

FRESH = """
import json, resource
from trl import GRPOTrainer
def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime
before = used()
import pte_trl
seconds = used() - before
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AttentionInterface, GenerationMixin
print(json.dumps({
    "seconds": seconds,
    "adapter": PEFT_TYPE_TO_CONFIG_MAPPING["PTE"].__name__,
    "attention": "blockwise" in AttentionInterface().valid_keys(),
    "generate": GenerationMixin._sample.__wrapped__.__name__,
}))
"""


def test_these_names_and_no_other():
    assert set(pte_trl.__all__) == set(dir(pte_trl)) == NAMES
    assert len(pte_trl.__all__) == len(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_can_be_imported(name):
    found = getattr(pte_trl, name)
    assert callable(found) and found.__name__ == name and found.__doc__


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pte_trl' has no attribute 'feed'"):
        _ = pte_trl.feed


def test_the_cache_has_what_a_loop_of_ones_own_needs():
    cache = importlib.import_module("pte_trl.cache")
    assert cache.BoundedCache is pte_trl.BoundedCache and {"BoundedCache", "feed"} <= set(cache.__all__)


def test_importing_is_cheap_and_registers_adapter_attention_and_generate():
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seconds"] < LIMIT
    assert (found["adapter"], found["attention"], found["generate"]) == ("PteConfig", True, "_sample")
