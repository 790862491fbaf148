"""The plan is the paper's set-up: what has to be trained and evaluated for every table and figure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.paper.plan import ITEMS, EvaluationRun, TrainingRun, cells, rules
from experiments.rules import Run, makefile, options, python
from pte_trl.evaluation.config import EvaluationArguments
from pte_trl.settings.parsing import parse
from pte_trl.training.arguments import parse_recipe
from pte_trl.training.global_batch import accumulation_steps

ROOT = Path(__file__).resolve().parent.parent
SCALES = ("paper", "tiny")


def sources(item: str, scale: str) -> list:
    return [cell.source for cell in cells(item, scale) if cell.source is not None]


def commands(scale: str, script: str) -> list[list[str]]:
    """Arguments of every command of the plan that runs a script; make's variables are left out."""
    found = dict.fromkeys(argv for run in rules(scale) for argv in run.commands if script in argv)
    return [[word for word in argv[2:] if not word.startswith("$(")] for argv in found]


def test_table_1_at_the_papers_scale():
    runs = sources("table1", "paper")
    assert {r.model for r in runs} == {"qwen3b", "qwen7b", "llama8b"}
    assert {r.run for r in runs} == {"baseline", "lora", "lora_c", "pte"}
    protocol = {(r.benchmark, r.budget, r.max_new_tokens, r.samples) for r in runs if isinstance(r, EvaluationRun)}
    once = {(name, 3072, 3072, 5) for name in ("math500", "olympiadbench", "minerva_math", "amc23")}
    assert protocol == once | {("aime24", 1536, 6144, 16), ("aime25", 1536, 6144, 16)}
    assert len([r for r in runs if isinstance(r, TrainingRun)]) == 3 * 3 * 3  # metrics x methods x models


def test_the_other_settings_of_the_paper():
    budgets = {768, 1024, 1536, 2048, 3072}
    for item in ("figure3", "figureA1", "figure4a", "figure4b"):
        assert {r.budget for r in sources(item, "paper")} == budgets
        assert {r.max_new_tokens for r in sources(item, "paper")} == {3072}
    assert {r.model for r in sources("figure3", "paper")} == {"qwen7b", "llama8b"}
    assert {(r.budget, r.max_new_tokens, r.samples) for r in sources("table2", "paper")} == {
        (budget, 6144, 16) for budget in (768, 1024, 1536)
    }
    assert {r.evict_ratio for r in sources("tableA1", "paper")} == {0.25, 0.2, 0.15, 0.1, 0.05}
    assert {r.eviction for r in sources("figure4b", "paper")} == {"sliding_window", "h2o", "pyramidkv", "headkv"}
    lengths = {3072, 6144, 12288, 24576, 49152, 65536}
    assert {(r.budget, r.max_new_tokens) for r in sources("figure5", "paper")} == {(1024, n) for n in lengths}
    runs = {r.run: r.options for r in sources("table3", "paper") if isinstance(r, TrainingRun)}
    assert set(runs) == {"lora", "lora-6144", "pte", "pte-4096", "pte-5120", "pte-6144"}
    assert runs["pte-4096"][-4:] == ("--max_completion_length", "4096", "--offload_cache", "true")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("item", ITEMS)
def test_no_two_settings_share_a_folder_and_no_number_is_forgotten(item, scale):
    found = cells(item, scale)
    assert len({tuple(cell.keys.items()) for cell in found}) == len(found)
    by_folder = {}
    for source in sources(item, scale):
        assert by_folder.setdefault(source.folder, source) == source


@pytest.mark.parametrize("scale", SCALES)
def test_every_command_of_the_plan_parses(scale, monkeypatch):
    monkeypatch.chdir(ROOT)
    training, evaluation = commands(scale, "recipes/grpo_pte.py"), commands(scale, "recipes/evaluate.py")
    assert (len(training), len(evaluation)) == ((18, 380) if scale == "paper" else (12, 172))
    for argv in training:
        script, args = parse_recipe([*argv, "--use_cpu", "true", "--bf16", "false"])
        variant = args.output_dir.rsplit("/", 1)[1]
        assert args.method == variant.partition("-")[0]
        if scale == "paper":
            assert args.per_device_train_batch_size * args.gradient_accumulation_steps == args.global_batch == 512
        assert script.use_global_tokens == (variant != "pte-global_0")
        assert script.encode_evicted == (variant != "pte-global_only")
    for argv in evaluation:
        (args,) = parse((EvaluationArguments,), argv)
        assert args.model_name_or_path
        assert (args.adapter is None) == ("/baseline/" in args.output_dir)


@pytest.mark.parametrize("scale", SCALES)
def test_make_plans_every_item(scale, tmp_path):
    """Only what make prints: nothing is run, and nothing of an earlier run is looked at."""
    done = plan_of("reproduce-all", scale, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("recipes/evaluate.py") == (380 if scale == "paper" else 172)
    assert done.stdout.count("recipes/grpo_pte.py") == (18 if scale == "paper" else 12)
    assert done.stdout.count("experiments.paper.render") == len(ITEMS)
    assert done.stdout.count("experiments.tiny.pretrain") == (scale == "tiny")
    assert not (tmp_path / "outputs" / scale / "train").exists()


def test_a_rollout_of_lora_spans_no_optimizer_step(monkeypatch):
    """It decodes two micro-batches at once, on however many GPUs share the paper's global batch."""
    monkeypatch.chdir(ROOT)
    for argv in commands("paper", "recipes/grpo_pte.py"):
        _, args = parse_recipe([*argv, "--use_cpu", "true", "--bf16", "false"])
        if args.method == "lora":
            assert args.steps_per_generation == 2
            for gpus in (1, 2, 8, 16, 32):
                assert accumulation_steps(args.global_batch, args.per_device_train_batch_size, gpus) % 2 == 0
        else:
            assert args.steps_per_generation == args.gradient_accumulation_steps


def test_make_launches_on_as_many_gpus_as_it_is_told(tmp_path):
    done = plan_of("reproduce-tableA1", "paper", tmp_path, "GPUS=4")
    assert "--num_processes 4 " in done.stdout and "accumulation" not in done.stdout


def without_make() -> dict[str, str]:
    """The environment without what a make above the tests has set."""
    return {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}


def plan_of(target: str, scale: str, tmp_path: Path, *variables: str) -> subprocess.CompletedProcess:
    locks = [path.name for path in ROOT.glob("requirements*.lock")]
    for name in ("Makefile", "pte_trl", "experiments", "recipes", "pyproject.toml", *locks):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    environment = without_make()
    command = ["make", "-n", target, f"SCALE={scale}", f"PYTHON={sys.executable}", f"VENV={tmp_path}/venv", *variables]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_a_run_is_a_rule_that_make_reads(tmp_path):
    """What is data arrives as words; make's variables are expanded; `present` asks for the file, not for its date."""
    program = (*python("experiments.study.collect", "a b"), *options(windows=[8, 16], kl=None), "it's", "$@")
    runs = [
        Run("all", ("out/result",), phony=True),
        Run("out/result", ("need",), (("@echo", "first"), program), ("base",)),
        Run("out/result", (), (("a rule of the same target",),)),
    ]
    (tmp_path / "Makefile").write_text("PY := python\n" + makefile("a test", runs))
    for name in ("need", "base"):
        (tmp_path / name).touch()

    def make(*arguments: str) -> list[str]:
        command = ["make", "-n", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=without_make(), capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    command = "python -m experiments.study.collect 'a b' --windows 8 16 'it'\"'\"'s' out/result"
    assert make("all") == ["echo first", command]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/result").touch()
    assert make("all") == ["make: Nothing to be done for 'all'."]
    assert make("all", "-W", "base") == ["make: Nothing to be done for 'all'."]
    assert make("all", "-W", "need") == ["echo first", command]


@pytest.mark.parametrize("module", ["experiments.study.plan", "experiments.paper.plan"])
def test_a_plan_needs_no_environment(module):
    """`-S` leaves site-packages out: make asks for the plans before anything is installed."""
    command = [sys.executable, "-S", "-m", module, "tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={})
    assert done.returncode == 0 and "recipes/evaluate.py" in done.stdout, done.stderr
