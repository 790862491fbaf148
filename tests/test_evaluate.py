"""recipes/evaluate.py on a real (tiny, untrained) model: resumable, and the same however it is run."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pte_trl.cache.eviction import STRATEGIES
from pte_trl.cache.policy import CachePolicy
from pte_trl.data.prompts import tokens_of
from pte_trl.evaluation.benchmarks import load_benchmark
from pte_trl.evaluation.config import FROM_RECIPE, EvaluationArguments, ModelSource, short_name
from pte_trl.evaluation.generate import GenerateArguments, prepare
from pte_trl.evaluation.prefix import prefix_records
from pte_trl.evaluation.records import SCHEMA, read_records
from pte_trl.evaluation.regrade import regrade
from pte_trl.evaluation.runner import CHUNK_TOKENS, REFILLS, chunk_size, prompt_tokens, sample_window, seed_of
from pte_trl.evaluation.script import main
from pte_trl.models.tokens import load_tokenizer
from pte_trl.rollouts.rollout import rollout, schedules_of
from pte_trl.settings.parsing import read_recipe
from pte_trl.training.arguments import RecipeArguments
from pte_trl.training.run import load_data
from tests.evaluations import PROBLEMS, SAMPLES, argv, content, untrained
from tests.forked import python

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def finished(setting, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    main(argv(setting, out))
    return out


def test_every_sample_is_a_record_with_its_settings(setting, finished):
    records = read_records(finished / "sums")
    assert [r["sample"] for r in records] == list(range(SAMPLES)) * PROBLEMS
    assert len({r["sample_seed"] for r in records}) == len(records)
    assert {r["gold"] for r in records} <= set("0123456789")
    assert any(r["evictions"] for r in records)
    for record in records:
        assert record["schema"] == SCHEMA
        assert record["sample_window"] == 48 - record["prompt_tokens"]
        assert record["finish_reason"] == ("length" if record["tokens"] == 40 else "stop")
        assert record["adapter"] == str(setting / "adapter")
        assert record["prompt"].endswith("<|im_start|>assistant\n")
    manifest = json.loads((finished / "sums" / "manifest.json").read_text())
    assert manifest["settings"]["samples"] == SAMPLES
    assert manifest["versions"]["torch"]


def test_another_batch_size_gives_the_same_records(setting, finished, tmp_path):
    main(argv(setting, tmp_path, batch_size=64))
    assert content(tmp_path) == content(finished)


def test_a_row_that_has_ended_takes_the_next_sample(setting, finished, tmp_path, monkeypatch):
    """Two rows decode all samples of a window that a chunk has, and the records are the same."""
    calls = []

    def counted(model, prompts, policy, **options):
        calls.append((len(prompts), options["batch_size"]))
        return rollout(model, prompts, policy, **options)

    monkeypatch.setattr("pte_trl.evaluation.runner.rollout", counted)
    main(argv(setting, tmp_path, batch_size=2))
    assert sum(samples for samples, _ in calls) == PROBLEMS * SAMPLES
    assert {rows for _, rows in calls} == {2} and max(calls)[0] > 2
    assert content(tmp_path) == content(finished)


@pytest.mark.parametrize(("eviction", "refills"), [("sliding_window", REFILLS), ("h2o", 1)])
def test_chunks_are_as_large_as_they_may_be_and_as_many_for_every_process(eviction, refills):
    options = {"model_name_or_path": "m", "output_dir": "o", "benchmarks": ["b"], "window": 8, "eviction": eviction}
    for samples in (1, 7, 480, 2500, 10_784):
        for processes in (1, 2, 8):
            for batch, length in ((1, 65_536), (64, 3072), (64, 65_536), (512, 65_536)):
                args = EvaluationArguments(**options, batch_size=batch, max_new_tokens=length)
                size = chunk_size(samples, processes, args)
                most = max(batch, min(refills * batch, CHUNK_TOKENS // length))
                assert 1 <= size <= most
                chunks = -(-samples // size)
                share = -(-chunks // processes)  # of the process that has the most
                assert share * size < 2 * samples / processes + processes or chunks <= processes
                assert size == most or (share - 1) * most * processes < samples


def test_a_shorter_evaluation_can_be_cut_from_a_longer_one(setting, finished, tmp_path):
    """Record by record the same: text, verdict, evictions, how it ended, and the settings."""
    main(argv(setting, tmp_path, max_new_tokens=24))
    long, short = read_records(finished / "sums"), read_records(tmp_path / "sums")
    assert short == prefix_records(long, 24, load_tokenizer(ModelSource(model_name_or_path=str(setting / "model"))))
    assert {r["finish_reason"] for r in short} == {"length", "stop"}
    assert any(r["tokens"] > 24 for r in long), "nothing is cut"


def test_a_second_run_does_nothing_and_a_lost_sample_alone_is_made_again(setting, finished, tmp_path, capsys):
    folder = tmp_path / "sums"
    folder.mkdir()
    lines = content(finished).splitlines(keepends=True)
    (folder / "part-3.jsonl").write_text("".join(lines[:9] + lines[10:]) + lines[9][:50])
    main(argv(setting, tmp_path))
    assert "20 of 21 samples are there" in capsys.readouterr().out
    assert content(tmp_path) == content(finished)
    before = (folder / "records.jsonl").stat()
    main(argv(setting, tmp_path))
    assert "nothing to do" in capsys.readouterr().out
    assert (folder / "records.jsonl").stat().st_mtime_ns == before.st_mtime_ns


def test_in_bfloat16_too_a_batch_cut_by_a_kill_gives_the_same_records(setting, tmp_path):
    """There the text depends on what is decoded together: what is left must not be put into new batches."""
    main(argv(setting, tmp_path / "whole", dtype="bfloat16", batch_size=8))
    lines = content(tmp_path / "whole").splitlines(keepends=True)
    folder = tmp_path / "cut" / "sums"
    folder.mkdir(parents=True)
    (folder / "part-0.jsonl").write_text("".join(lines[::3]))
    main(argv(setting, tmp_path / "cut", dtype="bfloat16", batch_size=8))
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def launch(setting, out, *prefix: str, **changes) -> subprocess.Popen:
    command = [python(), *prefix, str(ROOT / "recipes/evaluate.py"), *argv(setting, out, **changes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_killed_in_the_middle_and_resumed_nothing_is_lost_or_doubled(setting, finished, tmp_path):
    process = launch(setting, tmp_path, batch_size=1)
    part, deadline = tmp_path / "sums" / "part-0.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (part.exists() and part.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
        assert process.poll() is None, process.stdout.read().decode()
    process.send_signal(signal.SIGKILL)
    process.communicate()  # to the end of its output: whoever wrote there has ended
    assert 3 <= part.read_bytes().count(b"\n") < PROBLEMS * SAMPLES, "it was not killed in the middle"
    main(argv(setting, tmp_path))
    assert content(tmp_path) == content(finished)


def test_two_processes_give_the_same_records(setting, finished, tmp_path):
    config = str(ROOT / "accelerate_configs/ddp.yaml")
    options = ("--config_file", config, "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0")
    process = launch(setting, tmp_path, "-m", "accelerate.commands.accelerate_cli", "launch", *options)
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output
    assert json.loads((tmp_path / "sums" / "manifest.json").read_text())["processes"] == 2
    assert content(tmp_path) == content(finished)


def test_regrading_gives_the_verdicts_back(finished, tmp_path):
    folder = tmp_path / "sums"
    folder.mkdir()
    right = json.loads(content(finished).splitlines()[0])
    right |= {"completion": rf"so \boxed{{{right['gold']}}}", "correct": False, "reason": "wrong", "extracted": "?"}
    (folder / "records.jsonl").write_text(json.dumps(right) + "\n")
    (folder / "manifest.json").touch()
    os.utime(folder / "manifest.json", (0, 0))
    assert regrade(folder) == 1
    assert (folder / "manifest.json").stat().st_mtime > 0, "make would not render the tables again"
    graded = read_records(folder)[0]
    assert (graded["correct"], graded["reason"], graded["extracted"]) == (True, "correct", right["gold"])
    assert regrade(folder) == 0


def test_prompts_beyond_the_budget_are_recorded_as_such(setting, finished, tmp_path):
    longest = max(record["prompt_tokens"] for record in read_records(finished / "sums"))
    summary = main(argv(setting, tmp_path, budget=longest))[str(setting / "sums.jsonl")]
    records = read_records(tmp_path / "sums")
    without = [r for r in records if r["finish_reason"] == "no_room"]
    assert {r["problem_id"] for r in without} == {r["problem_id"] for r in records if r["prompt_tokens"] == longest}
    assert summary["no_room_rate"] == len(without) / len(records) > 0
    assert not any(r["correct"] for r in without)


@pytest.mark.parametrize("eviction", STRATEGIES)
def test_every_strategy_can_be_evaluated(setting, finished, tmp_path, eviction):
    main(argv(setting, tmp_path, eviction=eviction, limit=2, samples=1))
    records = read_records(tmp_path / "sums")
    assert [r["eviction"] for r in records] == [eviction] * 2
    same = [r["completion"] for r in records] == [r["completion"] for r in read_records(finished / "sums")[:4:3]]
    assert same == (eviction == "sliding_window")


def test_a_benchmark_is_called_by_its_files_name_without_any_known_ending(setting, tmp_path, monkeypatch):
    names = {"org/set": "set", "org/set-1.5": "set-1.5", "d/sums.jsonl": "sums", "d/sums.csv.gz": "sums"}
    assert {name: short_name(name) for name in names} == names
    monkeypatch.chdir(tmp_path)
    assert short_name(".") == tmp_path.name
    with pytest.raises(ValueError, match="same folder"):
        EvaluationArguments(model_name_or_path="m", output_dir="o", benchmarks=["a/x.jsonl.gz", "b/x.csv"])


def test_what_is_graded_comes_from_the_recipe_unless_it_is_said(tmp_path):
    (tmp_path / "r.yaml").write_text('model_name_or_path: m\nanswer_after: "</think>"\nlearning_rate: 1.0e-3\n')
    given = {"recipe": str(tmp_path / "r.yaml"), "output_dir": "o", "benchmarks": ["math500"]}
    assert EvaluationArguments(**given).answer_after == "</think>"
    assert EvaluationArguments(**given, answer_after="</t>").answer_after == "</t>"
    assert not hasattr(ModelSource(recipe=given["recipe"]), "answer_after")


GIVEN = {
    "model_name_or_path": "m",
    "dtype": "float32",
    "attn_implementation": "sdpa",
    "trust_remote_code": True,
    "system_prompt": "Think.",
    "system_prompt_role": "user",
    "chat_template_kwargs": {"enable_thinking": False},
    "generation_prefix": "<think>\n",
    "data_dir": "d",
    "answer_after": "</think>",
    "temperature": 0.3,
    "top_p": 0.9,
}


@pytest.mark.parametrize("key", FROM_RECIPE)
def test_every_shared_key_comes_from_the_recipe_unless_it_is_said(tmp_path, key):
    """The recipe's own `temperature` and `top_p` are the training's."""
    of_recipe = {theirs: GIVEN[ours] for ours, theirs in FROM_RECIPE.items()} | {"temperature": 1.0, "top_p": 1.0}
    (tmp_path / "r.yaml").write_text(json.dumps(of_recipe))
    evaluation = {"recipe": str(tmp_path / "r.yaml"), "output_dir": "o", "benchmarks": ["math500"]}
    assert getattr(EvaluationArguments(**evaluation), key) == GIVEN[key]
    other = {"trust_remote_code": False, "temperature": 0.0, "top_p": 0.5, "dtype": "float16"}.get(key)
    other = other if other is not None else {"chat_template_kwargs": {}, "system_prompt_role": "system"}.get(key, "x")
    assert getattr(EvaluationArguments(**evaluation, **{key: other}), key) == other
    if key != "answer_after":
        asked = GenerateArguments(recipe=evaluation["recipe"], question="?", window=8)
        assert getattr(asked, key) == GIVEN[key]


@pytest.mark.parametrize("name", ["qwen3b", "qwen7b", "llama8b"])
def test_the_papers_recipes_say_how_they_are_evaluated(name):
    path = ROOT / f"recipes/{name}.yaml"
    args = EvaluationArguments(recipe=str(path), output_dir="o", benchmarks=["math500"])
    assert (args.temperature, args.top_p) == (0.6, 0.95)
    assert {"eval_temperature", "eval_top_p"} <= set(read_recipe("recipe", str(path)))
    thinks = ("user", "<think>\n") if name == "llama8b" else ("system", None)
    assert (args.system_prompt_role, args.generation_prefix) == thinks


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("role", ["system", "user"])
def test_training_evaluation_and_generate_make_the_same_prompt(setting, tmp_path, role, chat):
    prompt = {"system_prompt": "Think.", "system_prompt_role": role}
    prompt |= {"generation_prefix": "<think>\n"} if chat else {}
    prompt |= {"model_name_or_path": str(setting / "model")}
    question = "1+1?"
    (tmp_path / "one.jsonl").write_text(json.dumps({"problem": question, "answer": "2"}) + "\n")
    script = RecipeArguments(**prompt, dataset_name=str(tmp_path / "one.jsonl"), decontaminate=False)
    tokenizer = load_tokenizer(script)
    tokenizer.chat_template = tokenizer.chat_template if chat else None
    settings = SimpleNamespace(chat_template_kwargs=None, cache_policy=CachePolicy())
    (trained,) = load_data(script, settings, tokenizer)["prompt"]
    args = EvaluationArguments(**prompt, output_dir="o", benchmarks=[script.dataset_name])
    (evaluated,) = prompt_tokens(load_benchmark(script.dataset_name), tokenizer, args)
    asked, _ = prepare(tokenizer, question, GenerateArguments(**prompt, question=question, window=8))
    assert tokens_of(trained, tokenizer) == evaluated == asked
    said = f"{question}\nThink." if role == "user" else f"Think.\n{question}"
    if chat:
        said = f"user\n{said}" if role == "user" else f"system\nThink.<|im_end|>\n<|im_start|>user\n{question}"
        said = f"<|im_start|>{said}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert tokenizer.decode(asked) == said


@pytest.mark.parametrize("policy", [CachePolicy(budget=48), CachePolicy(12), CachePolicy("auto")], ids=str)
def test_a_window_is_the_one_that_a_training_decodes_and_replays_with(policy):
    prompts = [[1] * length for length in (1, 7, 8, 9, 23, 47)]
    windows = [sample_window(policy, len(ids)) for ids in prompts]
    assert [schedule.window for schedule in schedules_of(policy, prompts, None, 40)] == windows
    assert policy.schedules(torch.tensor(windows)) == schedules_of(policy, prompts, None, 40)


def test_a_training_leaves_out_prompts_that_fill_its_budget(setting, capsys):
    script = RecipeArguments(str(setting / "model"), dataset_name=str(setting / "sums.jsonl"), decontaminate=False)
    tokenizer = load_tokenizer(script)
    settings = SimpleNamespace(chat_template_kwargs=None, cache_policy=CachePolicy(), budget=None)
    whole = load_data(script, settings, tokenizer)["prompt"]
    lengths = [len(tokens_of(prompt, tokenizer)) for prompt in whole]
    settings.budget = max(lengths)
    settings.cache_policy = CachePolicy(budget=settings.budget)
    assert len(load_data(script, settings, tokenizer)) == sum(n < max(lengths) for n in lengths) < len(whole)
    assert f"budget={max(lengths)}: prompts of more than {max(lengths) - 1} tokens leave" in capsys.readouterr().out


def test_seeds_and_windows_belong_to_the_sample():
    assert seed_of(0, "a", "b", 0) == seed_of(0, "a", "b", 0) < 2**32
    assert len({seed_of(s, b, p, n) for s in (0, 1) for b in "ab" for p in "cd" for n in (0, 1)}) == 16

    lengths, policy = (1, 8, 9, 512, 767, 768, 900), CachePolicy(budget=768)
    assert [sample_window(policy, tokens) for tokens in lengths] == [767, 760, 759, 256, 1, 0, 0]
    assert sample_window(CachePolicy(12), 900) == 12
    assert sample_window(CachePolicy(), 900) is None
