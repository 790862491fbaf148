"""The cache policy: what it refuses, the window it gives a batch, and the config classes that have one."""

import dataclasses

import pytest
import torch

from pte_trl import CachePolicy
from pte_trl.cache.arguments import CacheArguments
from pte_trl.cache.eviction import STRATEGIES
from pte_trl.cache.policy import FULL_CACHE
from pte_trl.cache.schedule import Schedule
from pte_trl.evaluation.config import EvaluationArguments
from pte_trl.evaluation.generate import GenerateArguments
from pte_trl.rollouts.rollout import rollout
from pte_trl.training.config import PteGRPOConfig
from pte_trl.training.distill import PteDistillConfig
from tests.models import tiny, with_pte


def test_a_window_is_the_same_for_every_prompt():
    assert CachePolicy(16).schedule(100) == CachePolicy(16).schedule(5) == Schedule(16)
    assert CachePolicy(16, evict_ratio=0.5).schedule(100).evict == 8


def test_auto_is_the_length_of_the_prompt():
    assert CachePolicy("auto").schedule(100) == Schedule(100)
    assert CachePolicy("auto").schedule(0) == Schedule(1)


def test_a_budget_leaves_the_rest_to_the_thought():
    policy = CachePolicy(budget=768)
    assert policy.schedule(512) == Schedule(256)
    assert policy.schedule(767) == Schedule(1)
    assert policy.fits(767) and not policy.fits(768)
    with pytest.raises(ValueError, match=r"^budget=768: nothing is left .* has 768 tokens; allowed is 769 or more"):
        policy.schedule(768)


def test_the_full_cache_has_no_schedule():
    assert CachePolicy() == FULL_CACHE
    assert not FULL_CACHE.bounded and FULL_CACHE.schedule(100) is None and FULL_CACHE.fits(10**9)
    assert CachePolicy(1).bounded and CachePolicy("auto").bounded and CachePolicy(budget=2).bounded


def test_windows_that_were_decided_before():
    policy = CachePolicy("auto", evict_ratio=0.5)
    assert policy.schedules(torch.tensor([4, 9])) == [Schedule(4, 0.5), Schedule(9, 0.5)]
    assert policy.schedules([3]) == [Schedule(3, 0.5)]


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CachePolicy(8).window = 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 8, "budget": 100}, "window=8, budget=100: give at most one of the two"),
        ({"window": "auto", "budget": 100}, "window='auto', budget=100"),
        ({"window": 0}, "window=0: must be 'auto' or an integer of at least 1"),
        ({"window": "big"}, "window='big'"),
        ({"window": "8"}, "window='8'"),
        ({"window": 2.5}, "window=2.5"),
        ({"window": True}, "window=True"),
        ({"budget": 1}, "budget=1: must be an integer of at least 2"),
        ({"budget": "auto"}, "budget='auto'"),
        ({"window": 8, "evict_ratio": 0}, "evict_ratio=0: must be a number above 0 and at most 1"),
        ({"window": 8, "evict_ratio": "0.5"}, "evict_ratio='0.5'"),
        ({"window": 8, "eviction": "h20"}, "eviction='h20': allowed are 'sliding_window', 'h2o'"),
        ({"window": 8, "eviction": ["h2o"]}, r"eviction=\['h2o'\]: allowed are"),
        ({"eviction": "h2o"}, "eviction='h2o': nothing is evicted from a full cache"),
    ],
)
def test_what_is_refused_is_named(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        CachePolicy(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("eviction", STRATEGIES)
def test_every_strategy_goes_by_its_name_or_as_an_object(eviction):
    assert CachePolicy(8, eviction=eviction).schedule(5) == Schedule(8)
    assert CachePolicy(8, eviction=STRATEGIES[eviction]()).schedule(5) == Schedule(8)


GROUPS = [[5 + i] * length for i, length in enumerate((3, 9, 1, 5, 12, 2, 7, 4, 6, 8, 11, 3, 10, 2, 5, 13))]


@pytest.mark.parametrize("policy", [CachePolicy("auto"), CachePolicy(budget=16)], ids=["auto", "budget"])
def test_the_window_of_a_prompt_is_the_same_on_any_number_of_gpus(policy):
    """Sixteen prompts with two completions each, on 1, 8 and 16 ranks that decode their share for themselves."""
    model, prompts, found = tiny("llama"), [prompt for prompt in GROUPS for _ in range(2)], []
    for ranks in (1, 8, 16):
        share, windows, completions = len(prompts) // ranks, [], []
        for at in range(0, len(prompts), share):
            options = {"max_new_tokens": 8, "eos_token_ids": [-1], "pad_token_id": 0}
            some = rollout(model, prompts[at : at + share], policy, seeds=list(range(at, at + share)), **options)
            windows, completions = windows + some.windows, completions + some.completion_ids
        found.append((windows, completions))
    expected = [len(prompt) if policy.window == "auto" else 16 - len(prompt) for prompt in prompts]
    assert found[0] == found[1] == found[2] and found[0][0] == expected


def test_a_policy_is_its_windows():
    model, prompts = with_pte(tiny("llama")), [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    options = {"max_new_tokens": 12, "eos_token_ids": [-1], "pad_token_id": 0, "seeds": [1, 2]}
    found = {policy: rollout(model, prompts, policy, **options) for policy in (CachePolicy("auto"), FULL_CACHE)}
    assert found[CachePolicy("auto")] != found[FULL_CACHE]
    for policy in (CachePolicy(5), CachePolicy(budget=10)):
        same = rollout(model, prompts, policy, **options)
        assert (same.windows, same.evictions) == ([5, 5], [Schedule(5).evictions(11)] * 2)
        assert same.completion_ids == found[CachePolicy("auto")].completion_ids
    assert found[FULL_CACHE].evictions == [0, 0]
    with pytest.raises(ValueError, match="budget=5: nothing is left for the thought"):
        rollout(model, [[5], *prompts[1:]], CachePolicy(budget=5), **options)


# ---- config classes ------------------------------------------------------------------------------------------------

TRAINERS = (PteGRPOConfig, PteDistillConfig)


def trainer_config(cls, tmp_path, **changes):
    return cls(**{"output_dir": str(tmp_path / "run"), "window": 8, "use_cpu": True, "bf16": False} | changes)


@pytest.mark.parametrize("cls", TRAINERS)
def test_a_trainer_s_keys_as_one_policy(cls, tmp_path):
    assert trainer_config(cls, tmp_path, evict_ratio=0.5).cache_policy == CachePolicy(8, evict_ratio=0.5)
    assert trainer_config(cls, tmp_path, window="12").cache_policy == CachePolicy(12)  # as a flag gives it
    assert trainer_config(cls, tmp_path, window="auto").cache_policy == CachePolicy("auto")
    assert trainer_config(cls, tmp_path, window=None, budget=64).cache_policy == CachePolicy(budget=64)


def test_lora_has_the_full_cache(tmp_path):
    assert trainer_config(PteGRPOConfig, tmp_path, method="lora", window="full").cache_policy == FULL_CACHE


def test_an_evaluation_s_keys_as_one_policy():
    keys = {"model_name_or_path": "m", "output_dir": "o", "benchmarks": ["b"]}
    assert EvaluationArguments(**keys).cache_policy == FULL_CACHE
    bounded = EvaluationArguments(**keys, budget=64, eviction="h2o", evict_ratio=0.5)
    assert bounded.cache_policy == CachePolicy(budget=64, evict_ratio=0.5, eviction="h2o")
    assert GenerateArguments(model_name_or_path="m", question="q", window=4).cache_policy == CachePolicy(4)


@pytest.mark.parametrize("cls", [*TRAINERS, EvaluationArguments, GenerateArguments])
def test_the_shared_keys_are_the_same_everywhere(cls):
    assert issubclass(cls, CacheArguments)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for shared in dataclasses.fields(CacheArguments):
        assert fields[shared.name].default == shared.default
        assert fields[shared.name].metadata["help"]


@pytest.mark.parametrize("cls", TRAINERS)
def test_both_trainers_check_their_trackers_and_name_the_run(cls, tmp_path):
    with pytest.raises(ValueError, match=r"^report_to='nonsense': allowed are none, "):
        trainer_config(cls, tmp_path, report_to="nonsense")
    args = trainer_config(cls, tmp_path, report_to="auto")
    assert args.run_name == "run" and args.report_to in ([], ["trackio"])
    assert trainer_config(cls, tmp_path, run_name="mine").run_name == "mine"
