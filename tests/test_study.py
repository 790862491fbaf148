"""The recall task leaks nothing, its runs work end to end, and the report says what the result files say."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from experiments.rules import makefile
from experiments.study import curves, load, plan, report
from experiments.study.arms import REGISTERS_SMOLLM2_ARMS
from experiments.study.collect import beside, collect
from experiments.study.evaluate import accuracy
from experiments.study.recall import (
    DIGIT,
    DIGITS,
    END,
    IDS,
    PAIR,
    WORDS,
    build_model,
    build_tokenizer,
    countdown,
    draw,
    write_completions,
    write_rows,
)
from pte_trl.adapter.check import check_adapter
from pte_trl.cache.schedule import Schedule
from pte_trl.evaluation.records import COMPLETE
from pte_trl.settings.parsing import parse
from pte_trl.training.arguments import ADAPTER_KEYS, RecipeArguments
from pte_trl.training.config import PteGRPOConfig
from pte_trl.training.distill.completions import read_completions
from pte_trl.training.distill.config import PteDistillConfig
from pte_trl.training.distill.script import DistillArguments
from tests.forked import python

ROOT = Path(__file__).resolve().parent.parent
HEAD = "PY := python\nREADY := /dev/null\nTINY_BASE := /dev/null\nTINY_DATA := /dev/null\n"  # the Makefile's own


def run(folder: Path, *command: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/recipes"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_sequence_asks_for_what_it_told():
    tokens, places = draw(50, 4, 9, torch.Generator().manual_seed(0))
    for row in tokens.tolist():
        words = [WORDS[token] for token in row]
        assert words[0] == "~9" and words[-1] == "<end>" and words[5:14] == [f"~{n}" for n in range(9, 0, -1)]
        told = {word[0]: word[1] for word in words[1:5]}
        assert sorted(told) == list("abcd")
        assert {words[place - 1]: words[place] for place in places} == told
    digits = (tokens[:, 1:5] - PAIR) % DIGITS
    assert len(digits.unique()) == DIGITS


@pytest.mark.parametrize(("window", "names"), [(8, 4), (12, 4), (16, 4), (8, 10), (16, 10)])
def test_nothing_but_the_state_leads_from_a_question_to_a_digit(window, names):
    """Under the window alone the logits of an answer do not depend on the digits at all; with a token less they do."""
    torch.manual_seed(0)
    model = build_model(0).double().eval()
    model.set_attn_implementation("sdpa")
    from pte_trl.replay.plan import replay_inputs

    def change(length: int) -> float:
        tokens, places = draw(1, names, length, torch.Generator().manual_seed(1))
        other = tokens.clone()
        told = tokens[:, 1 : names + 1] - PAIR
        other[:, 1 : names + 1] = PAIR + told // DIGITS * DIGITS + (told + 3) % DIGITS
        logits = [
            model(input_ids=x, **replay_inputs(model, torch.ones_like(x), 1, Schedule(window))).logits[
                :, places[0] - 1
            ]
            for x in (tokens, other)
        ]
        return (logits[0] - logits[1]).abs().max().item()

    length = countdown(Schedule(window), names)
    assert change(length) == 0
    assert change(length - 1) > 1e-9


def continued() -> list:
    """(training, the training whose adapter it starts from) of every study."""
    runs = [run for study in plan.studies() for run in study.runs]
    trained = {run.target.removesuffix("/manifest.json"): run for run in runs if run.target.endswith("/manifest.json")}
    commands = {name: run.commands[0] for name, run in trained.items() if "--adapter" in run.commands[0]}
    starts = {name: trained[command[command.index("--adapter") + 1]] for name, command in commands.items()}
    return [pytest.param(trained[name], start, id=name) for name, start in starts.items()]


@pytest.mark.parametrize(("run", "start"), continued())
def test_a_stage_takes_the_adapter_of_the_stage_before(run, start, monkeypatch):
    """What a recipe or a flag states of the adapter is what the adapter was made with: else training refuses it."""
    monkeypatch.chdir(ROOT)
    made, _ = settings_of(start)
    script, args = settings_of(run)
    stated = {key: getattr(script, key) for key in ADAPTER_KEYS if key in script.given}
    check_adapter(args.method, made.adapter_config(args.method), settings=stated)


def settings_of(run) -> tuple:
    """The parsed arguments of a training."""
    command = run.commands[0]
    distils = plan.DISTILL in command
    classes = (DistillArguments, PteDistillConfig) if distils else (RecipeArguments, PteGRPOConfig)
    return parse(classes, list(command[command.index("--config") :]))


def test_an_untrained_model_is_at_chance():
    model = build_model(0).eval()
    model.set_attn_implementation("sdpa")
    assert accuracy(model, 4, Schedule(8), countdown(Schedule(8), 4), 500) < 0.2


def test_the_tokenizer_survives_its_folder(tmp_path):
    from transformers import AutoTokenizer

    build_model(0).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "~16 a3 d7 ~2 ~1 a 3"
    assert tokenizer(text)["input_ids"] == [IDS[word] for word in text.split()]


def test_rows_end_in_every_question(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 8, 4, 9, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [len(row["thought"].split()) for row in rows] == [14, 16, 18, 20] * 2
    for row in rows:
        words = row["thought"].split()
        assert words[-1] + row["answer"] in words[:4]


def test_whole_thoughts_are_read_as_completions(tmp_path):
    write_completions(tmp_path / "rows.jsonl", 6, 2, [9, 11, 14], seed=0)
    rows = read_completions(str(tmp_path / "rows.jsonl"), build_tokenizer())
    assert rows["prompt"] == ["~9", "~11", "~14"] * 2
    for row in rows:
        words = [WORDS[token] for token in row["completion_ids"]]
        assert words[2] == row["prompt"] and words[-1] == END
        for name, digit in (words[-5:-3], words[-3:-1]):
            assert name + digit in words[:2]


def test_every_run_of_the_plan_works(tmp_path):
    """One seed, few steps: base, the arms that differ in code, results, table and plot."""
    recall = tmp_path / "outputs/study/recall"
    short = ["--steps", "5", "--batch", "16", "--rows", "64"]
    run(tmp_path, python(), "-m", "experiments.study.recall", "--output", "outputs/study/recall", *short)
    distill = [
        python(),
        str(ROOT / "recipes/distill_pte.py"),
        "--config",
        str(ROOT / "recipes/study/recall_distill.yaml"),
    ]
    few = ["--max_steps", "2", "--logging_steps", "1", "--dataset_limit", "64"]
    run(tmp_path, *distill, *few, "--per_device_train_batch_size", "8", "--output_dir", f"{recall}/pte_distilled-0")
    grpo = [python(), "-m", "experiments.study.grpo", "--config", str(ROOT / "recipes/study/recall_grpo.yaml"), *few]
    grpo += ["--per_device_train_batch_size", "16"]
    run(tmp_path, *grpo, "--adapter", f"{recall}/pte_distilled-0", "--output_dir", f"{recall}/pte_distilled_grpo-0")
    run(tmp_path, *grpo, "--method", "lora", "--window", "full", "--output_dir", f"{recall}/lora-0")
    state = json.loads((recall / "pte_distilled_grpo-0/trainer_state.json").read_text())
    assert max(entry.get("mismatch/max", 0) for entry in state["log_history"]) < 1e-4
    for arm in ("pte_distilled_grpo", "lora"):
        evaluate = ["-m", "experiments.study.evaluate", "--base", f"{recall}/base", "--adapter", f"{recall}/{arm}-0"]
        run(tmp_path, python(), *evaluate, "--samples", "64", "--output", f"{recall}/results/{arm}-0.json")
    out = run(tmp_path, python(), "-m", "experiments.study.report", f"{recall}/results", "--output", str(recall))
    assert "| lora | 1 |" in out and (recall / "table.md").read_text() == out
    for name in ("plot", "curves"):
        assert (recall / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_only_the_answer_is_rewarded_and_trained(tmp_path):
    from datasets import Dataset

    from experiments.study.grpo import GivenThoughtTrainer, RightAnswer
    from pte_trl.training.arguments import RecipeArguments
    from pte_trl.training.config import PteGRPOConfig

    tokens, places = draw(8, 4, 14, torch.Generator().manual_seed(0))
    words = [[WORDS[token] for token in row[: places[n % 4] + 1]] for n, row in enumerate(tokens.tolist())]
    rows = [{"prompt": w[0], "thought": " ".join(w[1:-1]), "answer": w[-1]} for w in words]
    settings = {"window": 8, "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 1, "use_cpu": True}
    settings |= {"bf16": False, "report_to": "none", "save_strategy": "no", "output_dir": str(tmp_path)}
    model = build_model(0)
    model.set_attn_implementation("sdpa")
    trainer = GivenThoughtTrainer(
        model=model,
        reward_funcs=RightAnswer(build_tokenizer()),
        args=PteGRPOConfig(**settings, max_completion_length=64),
        train_dataset=Dataset.from_list(rows),
        processing_class=build_tokenizer(),
        peft_config=RecipeArguments("unused", rank=4, num_global_tokens=4).adapter_config("pte"),
    )
    output = trainer._generate_and_score_completions([row for row in rows[:2] for _ in range(4)])
    assert output["tool_mask"].sum(1).tolist() == [1] * 8
    for ids, chosen, row in zip(
        output["completion_ids"], output["tool_mask"], rows[:1] * 4 + rows[1:2] * 4, strict=True
    ):
        at = chosen.argmax().item()
        assert [WORDS[token] for token in ids[:at]] == row["thought"].split()
        assert WORDS[ids[at + 1]] == "<end>"
    assert RightAnswer(build_tokenizer())([[5, DIGIT + 3, 1], [5, DIGIT + 4, 1]], ["3", "3"]) == [1.0, 0.0]


def test_the_report_says_what_the_files_say(tmp_path):
    for seed, (control, ours) in enumerate([(0.4, 0.1), (0.6, 0.3)]):
        for arm, mean in (("lora_c_distilled", control), ("pte_distilled", ours)):
            values = {"64": {"kl": {"mean": mean, "se": 0.01, "texts": 4}}}
            (tmp_path / f"{arm}-{seed}.json").write_text(json.dumps({"values": values}))
    found = report.read(tmp_path)
    assert found["kl"]["pte_distilled"]["64"].values == (0.1, 0.3)
    assert "| pte_distilled | 2 | 0.200 ± 0.141 |" in report.table("kl", found["kl"])
    assert report.gaps_closed(found) == ["kl, W = 64: pte_distilled closes 60 % of what lora_c_distilled leaves"]
    assert report.gap_closed(found["kl"]) == ["W = 64: pte_distilled closes 60 % of what lora_c_distilled leaves"]
    (tmp_path / "pte_distilled-2.json").write_text(json.dumps({"values": {"128": {"kl": {"mean": 1.0}}}}))
    with pytest.raises(ValueError, match="different numbers of seeds"):
        report.read(tmp_path)
    with pytest.raises(ValueError, match="no results"):
        report.read(tmp_path / "nowhere")


def test_courses_are_read_by_arm_and_seed(tmp_path):
    for name, values in {"pte-0": [0.1, 0.3], "pte-1": [0.2, 0.5], "pte_distilled-0": [0.9, 0.4]}.items():
        metric = "loss" if "distilled" in name else "reward"
        history = [{"step": 10 * n, metric: value, "grad_norm": 1.0} for n, value in enumerate(values, 1)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": [*history, {"step": 20}]}))
    found = curves.courses(tmp_path)
    assert found["reward"] == {"pte": [[(10, 0.1), (20, 0.3)], [(10, 0.2), (20, 0.5)]]}
    assert found["loss"] == {"pte_distilled": [[(10, 0.9), (20, 0.4)]]}
    curves.plot(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert curves.courses(tmp_path / "pte-0") == {}


def test_collecting_evaluations(tmp_path):
    for window, verdicts in (("16", [True, False]), ("8", [False, False]), ("full", [True, True])):
        folder = tmp_path / window / "sums"
        folder.mkdir(parents=True)
        rows = [
            {"problem_id": str(n), "sample": 0, "correct": right, "contaminated": False, "completion": "", "tokens": 1}
            | {"finish_reason": "stop", "evictions": 0, "gold_note": None, "gold": "5"}
            for n, right in enumerate(verdicts)
        ]
        (folder / COMPLETE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    accuracies = collect(tmp_path)
    assert list(accuracies.items()) == [("8", 0.0), ("16", 0.5), ("full", 1.0)]
    both = beside(accuracies, {"16": {"kl": {"mean": 0.2}}})
    assert both["16"] == {"accuracy": {"mean": 0.5}, "kl": {"mean": 0.2}}
    assert both["full"] == {"accuracy": {"mean": 1.0}}
    (tmp_path / "32").mkdir()
    with pytest.raises(ValueError, match="32: 0 finished evaluations"):
        collect(tmp_path)


def test_the_plan_is_one_that_make_reads(tmp_path):
    (tmp_path / "Makefile").write_text(HEAD + makefile("a test", plan.rules()))
    shown = subprocess.run(["make", "-n", "study"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    seeds, arms = len(plan.SEEDS), len(plan.ARMS)
    adapters = seeds * (arms + len(plan.CHOICES) + len(plan.WINDOWS_ARMS) + 1)
    at_ratios = len(load.RATIOS) * len(load.RATIO_ARMS)
    loads = len(load.DIGITS) * (seeds * (len(load.LOAD_ARMS) + at_ratios) + 1)
    assert sum("experiments.study.evaluate" in line for line in lines) == adapters + 1 + loads
    on_smollm2 = (plan.SMOLLM2_ARMS, plan.NAMES_ARMS, plan.ARITHMETIC_ARMS, REGISTERS_SMOLLM2_ARMS)
    assert sum("pte_trl.inspect.kl" in line for line in lines) == seeds * sum(map(len, on_smollm2)) + 4
    place = {
        run: n for n, line in enumerate(lines) for run in [line.split("--output_dir ")[-1]] if "output_dir" in line
    }
    for seed in plan.SEEDS:
        for folder, arm in (
            (folder, arm)
            for folder in (plan.RECALL, plan.SUMS, plan.ARITHMETIC, "outputs/study/registers")
            for arm in plan.ARMS
            if arm.start
        ):
            # an arm that starts from another comes behind it
            assert place[f"{folder}/{arm.name}-{seed}"] > place[f"{folder}/{arm.start}-{seed}"]
