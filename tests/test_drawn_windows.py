"""Windows and evict ratios drawn from ranges: the draws, what depends on them, and trainings under them."""

import json
import math
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from trl.trainer.utils import RepeatSampler

from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule, packed, unpacked
from pte_trl.evaluation.config import EvaluationArguments
from pte_trl.evaluation.generate import GenerateArguments
from pte_trl.rollouts.batching import EngineCache
from pte_trl.rollouts.engine import Room
from pte_trl.runtime.startup import cache_lines, longest_schedule
from pte_trl.settings.parsing import parse
from pte_trl.training.arguments import parse_recipe
from pte_trl.training.schedules import RolloutCount, schedules_for
from tests.models import tiny, with_pte
from tests.test_engine import PROMPTS, assert_same, sampled
from tests.test_recipes import recipe
from tests.test_settings import distill, grpo, logged

RANGES = CachePolicy((4, 11), evict_ratio=(0.1, 0.9))

# ---- draws -------------------------------------------------------------------------------------------------------


def test_a_window_is_log_uniform_on_whole_numbers_with_both_ends():
    low, high, count = 3, 8, 4000
    found = Counter(CachePolicy((low, high)).draw(str(n)).window for n in range(count))
    assert sorted(found) == list(range(low, high + 1))
    for window, times in found.items():
        share = math.log((window + 1) / window) / math.log((high + 1) / low)
        assert abs(times / count - share) < 4 * math.sqrt(share * (1 - share) / count), window


def test_a_ratio_is_uniform():
    found = [CachePolicy(8, evict_ratio=(0.1, 0.5)).draw(str(n)).evict_ratio for n in range(2000)]
    assert 0.1 <= min(found) < 0.101 and 0.499 < max(found) <= 0.5
    assert sum(found) / len(found) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("window", [(1, 1), (1, 2), (5, 5), (7, 4096), (1000, 1001)])
def test_the_ends_of_a_range(window):
    policy = CachePolicy(window, evict_ratio=(0.2, 0.7))
    assert policy.at(0, 0) == CachePolicy(window[0], evict_ratio=0.2)
    assert policy.at(1, 1) == CachePolicy(window[1], evict_ratio=0.7)
    assert window[0] <= policy.at(0.5, 0.5).window <= window[1]


def test_a_draw_is_the_same_on_every_machine_and_of_one_value_it_is_that_value():
    drawn = CachePolicy((32, 512), evict_ratio=(0.1, 0.5)).draw("0 17 0 3")
    assert (drawn.window, drawn.evict_ratio) == (42, pytest.approx(0.162861919316, abs=1e-12))
    assert CachePolicy((32, 512)).draw("0 17 0 3").window == 42  # whether a ratio is drawn or not
    for policy in (CachePolicy(8), CachePolicy("auto"), CachePolicy(budget=9), CachePolicy(evict_ratio=(0.1, 0.5))):
        assert not policy.drawn and (not policy.bounded or policy.draw("1") is policy)


def test_lists_as_yaml_gives_them_are_ranges():
    assert CachePolicy([4, 11], evict_ratio=[0.1, 0.9]) == RANGES and hash(RANGES)


def test_a_range_has_no_schedule_of_its_own():
    for policy in (RANGES, CachePolicy(8, evict_ratio=(0.1, 0.5)), CachePolicy((2, 3))):
        with pytest.raises(ValueError, match="a range gives no schedule; allowed are single values") as caught:
            policy.schedule(5)
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match="a range gives no schedule"):
            sampled(tiny(), policy=policy)


def test_schedules_travel_as_integers():
    schedules = [Schedule.of(window, evict) for window in range(1, 90) for evict in range(1, window + 1)]
    schedules += [Schedule.of(window, evict) for window in (4096, 99_991) for evict in (1, 7, window - 1, window)]
    assert packed(schedules).tolist() == [[s.window, s.evict] for s in schedules]
    assert unpacked(packed(schedules)) == schedules and packed([]).shape == (0, 2)
    assert len(set(unpacked(packed([Schedule(8, 0.2), Schedule(8, 0.25)])))) == 1  # E = 2 of both


# ---- the draws of a training -------------------------------------------------------------------------------------


def process(rank: int = 0, step: int = 0, training: bool = True, policy: CachePolicy = RANGES, seed: int = 0):
    """What a draw reads of a trainer."""
    return SimpleNamespace(
        args=SimpleNamespace(cache_policy=policy, seed=seed),
        model=SimpleNamespace(training=training),
        state=SimpleNamespace(global_step=step),
        accelerator=SimpleNamespace(process_index=rank),
        rollout_count=RolloutCount(),
    )


@pytest.mark.parametrize("group", [1, 4, 6])
def test_the_same_draws_on_any_number_of_gpus(group):
    """24 samples; groups of six lie on several of eight ranks. One draw for a group, and many groups' draws differ."""
    prompts, found = [[number // group] for number in range(24)], []
    for ranks in (1, 2, 4, 8):
        share = 24 // ranks
        parts = [schedules_for(process(rank), prompts[rank * share :][:share], group) for rank in range(ranks)]
        found.append([schedule for part in parts for schedule in part])
    assert all(each == found[0] for each in found)
    assert all(len(set(found[0][at : at + group])) == 1 for at in range(0, 24, group))
    assert len(set(found[0])) > 24 // group // 2


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_has_the_next_samples_of_a_rollout(ranks):
    """What the place of a sample relies on: how accelerate gives TRL's sampler to processes."""

    def samples(of: int) -> RepeatSampler:
        return RepeatSampler(range(40), mini_repeat_count=2, batch_size=8, repeat_count=1, shuffle=True, seed=of)

    size, whole = 16 // ranks, list(samples(3))
    batches = [BatchSampler(samples(3), size, drop_last=False) for _ in range(ranks)]
    shares = [list(BatchSamplerShard(each, ranks, rank)) for rank, each in enumerate(batches)]
    for rollout in range(5):
        found = [place for share in shares for place in share[rollout]]
        assert found == whole[16 * rollout : 16 * (rollout + 1)]


def test_a_resumed_run_draws_what_it_would_have_drawn():
    prompts, went_on = [[7]] * 6, process()
    course = {}
    for step in range(4):
        went_on.state.global_step = step
        course[step] = [schedules_for(went_on, prompts) for _ in range(2)]  # two rollouts in a step
    resumed = process(step=3)
    assert [schedules_for(resumed, prompts) for _ in range(2)] == course[3]
    seen = [tuple(rollout) for rollouts in course.values() for rollout in rollouts]
    assert len(set(seen)) == len(seen)
    assert schedules_for(process(seed=1), prompts) != course[0][0]


def test_every_evaluation_of_a_training_draws_alike():
    prompts = [[number] for number in range(12) for _ in range(2)]
    one, other = (schedules_for(process(step=step, training=False), prompts, 2) for step in (0, 7))
    assert one == other and len(set(one)) > 6
    assert schedules_for(process(rank=1, training=False), prompts[4:10], 2) == one[4:10]


def test_rows_of_an_evaluation_that_have_one_prompt_draw_for_their_completions():
    prompts, completions = [[7]] * 12, [[number] for number in range(12)]
    drawn = schedules_for(process(training=False), prompts, completion_ids=completions)
    assert len(set(drawn)) > 6
    assert schedules_for(process(rank=1, training=False), prompts[4:], completion_ids=completions[4:]) == drawn[4:]


# ---- rollouts ----------------------------------------------------------------------------------------------------


def test_rows_of_unlike_windows_and_ratios_are_decoded_together():
    """As by the reference implementation; no place more than the largest needs, and one engine for all draws."""
    model, kept, engines = with_pte(tiny("llama", torch.float64)), EngineCache(), []
    for round_ in range(2):
        drawn = [RANGES.draw(f"{round_} {n}").schedule(len(prompt)) for n, prompt in enumerate(PROMPTS)]
        assert len(set(drawn)) > 8
        options = {"policy": RANGES, "schedules": drawn}
        found = sampled(model, batch_size=4, engine_cache=kept, **options)
        assert found.schedules == drawn and max(found.evictions) > 5
        engines.append(kept.engine)
    assert engines[0] is engines[1]
    assert_same(found, sampled(model, reference=True, **options))
    largest = Room.needed(map(len, PROMPTS), [Schedule(11, 0.9)] * len(PROMPTS), 30)
    assert (kept.engine.cache.places, kept.engine.cache.evict_at_most) == (largest.places, largest.evict)


# ---- trainings ---------------------------------------------------------------------------------------------------

DRAWN = {"window": [3, 9], "evict_ratio": [0.2, 0.9]}


def watched(trainer, monkeypatch) -> list[list[tuple[int, int]]]:
    """(W, E) of the samples of every micro-batch, as it is scored."""
    scored, compute_loss = [], trainer._compute_loss

    def watch(model, inputs, *args):
        scored.append([tuple(pair) for pair in inputs["schedules"].tolist()])
        return compute_loss(model, inputs, *args)

    monkeypatch.setattr(trainer, "_compute_loss", watch)
    return scored


def test_grpo_draws_for_a_group_and_resumes_bit_by_bit(tmp_path, monkeypatch):
    """Two steps, and the second again from a checkpoint."""
    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 4}
    settings = DRAWN | sizes | {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-1")):
        torch.manual_seed(0)
        trainer = grpo(tmp_path, "pte", **settings)
        scored = watched(trainer, monkeypatch)
        trainer.train(resume_from_checkpoint=resume)
        runs.append((trainer, scored))
    (whole, scored), (resumed, again) = runs
    assert all(len(set(batch)) == 1 for batch in scored)  # a micro-batch is a group here
    assert len(scored) == 8 and len({batch[0] for batch in scored}) > 4
    assert again == scored[4:]
    weights = dict(resumed.model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in whole.model.named_parameters())
    assert max(logged(whole, "mismatch/max")) < 1e-4
    for step in range(2):
        windows = [batch[0][0] for batch in scored[4 * step : 4 * step + 4]]
        found = [logged(whole, f"rollout/{name}")[step] for name in ("window", "window_min", "window_max")]
        assert found == [sum(windows) / 4, min(windows), max(windows)]


@pytest.mark.parametrize("accumulated", [1, 2, 4])
def test_a_distillation_draws_for_a_sample(accumulated, tmp_path, monkeypatch):
    """Prompts and completions of several lengths; tokens after a sample's own first eviction alone are in the loss.

    Micro-batches, sorted by W, have different numbers of them, and the logged mean is that of all tokens.
    """
    size = {"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated}
    trainer = distill(tmp_path, "pte", **DRAWN | size, distilled_tokens="after_eviction")
    scored = watched(trainer, monkeypatch)
    trainer.train()
    steps = [sorted(chain(*scored[at : at + accumulated])) for at in range(0, len(scored), accumulated)]
    assert len(steps) == 2 and all(len(step) == 8 and len(set(step)) > 4 for step in steps)
    assert logged(trainer, "loss") == pytest.approx(logged(trainer, "kl_after_eviction"), rel=1e-2)
    assert logged(trainer, "rollout/window_max") == [max(step)[0] for step in steps]


def test_a_batch_in_which_nothing_was_evicted_has_a_loss_of_zero(tmp_path):
    trainer = distill(tmp_path, "pte", window=[50, 60], distilled_tokens="after_eviction", max_steps=1)
    trainer.train()
    assert logged(trainer, "loss") == logged(trainer, "grad_norm") == [0.0]


# ---- settings ----------------------------------------------------------------------------------------------------


def test_ranges_in_recipes_and_flags(tmp_path):
    argv = recipe(tmp_path, window=[4, 11], evict_ratio=[0.1, 0.9])
    assert parse_recipe(argv)[1].cache_policy == RANGES
    assert parse_recipe([*argv, "--window", "5", "9"])[1].cache_policy == CachePolicy((5, 9), evict_ratio=(0.1, 0.9))
    auto = [*argv, "--window", "auto", "--evict_ratio", "1"]
    assert parse_recipe(auto)[1].cache_policy == CachePolicy("auto", evict_ratio=1.0)
    _, args = parse_recipe([*argv, "--budget", "64"])
    assert args.cache_policy == CachePolicy(budget=64, evict_ratio=(0.1, 0.9))
    assert json.loads(json.dumps(args.to_dict()))["evict_ratio"] == [0.1, 0.9]
    assert not parse_recipe([*argv, "--method", "lora", "--window", "full"])[1].cache_policy.drawn


BAD = [
    ("window", [9, 5]),
    ("window", [0, 5]),
    ("window", [5]),
    ("window", [5, 9, 12]),
    ("window", [5, 9.5]),
    ("window", ["auto", 9]),
    ("window", [True, 9]),
    ("window", []),
    ("evict_ratio", [0.5, 0.1]),
    ("evict_ratio", [0.0, 0.5]),
    ("evict_ratio", [0.1, 1.5]),
    ("evict_ratio", [0.1, math.nan]),
    ("evict_ratio", [0.1, 0.2, 0.3]),
    ("evict_ratio", [0.1, "0.5"]),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_what_is_no_range_is_refused(tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"^{key}=.*: must be .*, or two, the smaller first, to draw from") as caught:
        parse_recipe(recipe(tmp_path, **{key: value}))
    assert "\n" not in str(caught.value)
    if isinstance(value, list):
        with pytest.raises(ValueError, match=rf"^{key}=.*: must be .*, or two, the smaller first, to draw from"):
            CachePolicy(**{"window": 8} | {key: value})


BAD_FLAGS = [
    (["--window", "9", "5"], r"window=\[9, 5\]: must be"),
    (["--window", "auto", "5"], r"window=\['auto', 5\]: must be"),
    (["--window", "5", "nine"], r"window=\[5, 'nine'\]: must be"),
    (["--evict_ratio", "0.1", "x"], "argument --evict_ratio.*: invalid float value: 'x'"),
    (["--window", "5", "9", "--method", "lora"], r"window=\[5, 9\]: method=lora keeps the full cache"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=str)
def test_a_flag_that_is_no_range_is_refused(tmp_path, flags, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        parse_recipe([*recipe(tmp_path), *flags])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "values"), [("window", ["8", "12"]), ("evict_ratio", ["0.1", "0.5"])])
def test_an_evaluation_has_one_of_each(key, values):
    question = ["--model_name_or_path", "m", "--question", "q", "--window", "8"]
    benchmark = ["--model_name_or_path", "m", "--benchmarks", "b", "--output_dir", "o", "--window", "8"]
    for cls, argv in ((EvaluationArguments, benchmark), (GenerateArguments, question)):
        (args,) = parse((cls,), [*argv, f"--{key}", values[0]])
        assert getattr(args, key) == float(values[0])
        with pytest.raises(ValueError, match=rf"^{key}=\[.*\]: must be one .*, since ranges are for training"):
            parse((cls,), [*argv, f"--{key}", *values])


def test_what_is_said_and_estimated_at_the_start():
    kept, evictions = cache_lines(CachePolicy((32, 512), evict_ratio=(0.1, 0.5)), 3072, 512)
    assert kept == "window drawn from 32 to 512 (log-uniform), evict_ratio drawn from 0.1 to 0.5"
    assert evictions == f"{Schedule(512, 0.5).evictions(3071)} to {Schedule(32, 0.1).evictions(3071)} at 3072 tokens"
    kept, _ = cache_lines(CachePolicy("auto", evict_ratio=(0.1, 0.5)), 3072, 512)
    assert kept == "window auto, W = a sample's own prompt, at most 512, evict_ratio drawn from 0.1 to 0.5"
    assert longest_schedule(CachePolicy((32, 512)), 100) == Schedule(512)
