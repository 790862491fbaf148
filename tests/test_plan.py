"""The plan is the paper's set-up: what has to be trained and evaluated for every table and figure."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.paper.plan import ITEMS, EvaluationRun, TrainingRun, cells, needed
from experiments.paper.scales import SCALES as BY_NAME
from experiments.paper.targets import rules
from experiments.rules import Run, makefile, options, python
from pte_trl.evaluation.config import EvaluationArguments
from pte_trl.settings.parsing import parse
from pte_trl.training.arguments import parse_recipe
from pte_trl.training.global_batch import accumulation_steps

ROOT = Path(__file__).resolve().parent.parent
SCALES = ("paper", "night", "tiny", "night-tiny")
# Trainings and evaluations of a scale, and of its Table 1.
COUNTS = {"paper": (18, 364), "night": (36, 414), "tiny": (12, 156), "night-tiny": (36, 414)}
TABLE1 = {"paper": (9, 72), "night": (9, 60), "tiny": (3, 24), "night-tiny": (9, 60)}


def sources(item: str, scale: str) -> list:
    return [cell.source for cell in cells(item, scale) if cell.source is not None]


def commands(scale: str, script: str) -> list[list[str]]:
    """Arguments of every command of the plan that runs a script; make's variables are left out."""
    found = dict.fromkeys(argv for run in rules(scale) for argv in run.commands if script in argv)
    found = [[re.sub(r"\$\(call WITHIN_A_STEP,(\d+),\d+\)", r"\1", word) for word in argv[2:]] for argv in found]
    return [[word for word in argv if not word.startswith("$(")] for argv in found]


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
    assert {(r.budget, r.max_new_tokens) for r in sources("figure5", "paper")} == {(1024, 65536)}
    runs = {r.run: r.options for r in sources("table3", "paper") if isinstance(r, TrainingRun)}
    assert set(runs) == {"lora", "lora-6144", "pte", "pte-4096", "pte-5120", "pte-6144"}
    assert runs["pte-4096"][-4:] == ("--max_completion_length", "4096", "--offload_cache", "true")


@pytest.mark.parametrize("scale", SCALES)
def test_how_many_runs_there_are(scale):
    """Table 1 of the paper is 9 trainings and 72 evaluations; docs/reproduce.md says so."""
    for items, counts in ((ITEMS, COUNTS), (("table1",), TABLE1)):
        runs = dict.fromkeys(run for item in items for run in needed(item, scale))
        trainings = sum(isinstance(run, TrainingRun) for run in runs)
        assert (trainings, len(runs) - trainings) == counts[scale]


@pytest.mark.parametrize("scale, last", [("paper", 65536), ("tiny", 2048), ("night", 16384)])
def test_figure_5_is_one_run_of_a_method_whose_shorter_lengths_are_prefixes(scale, last):
    found = [cell for cell in cells("figure5", scale) if cell.keys["method"] == "pte" and cell.seed in (None, 42)]
    assert len({cell.source for cell in found}) == 1 and found[0].source.max_new_tokens == last
    cuts = [int(cell.metric.removeprefix("pass@1@")) for cell in found]
    papers = [int(cell.keys["max_generation_length"]) for cell in found]
    assert cuts == [length * last // 65536 for length in papers] and max(cuts) == last


def test_seeds_of_the_night():
    """Three trainings where the paper has one, each with its evaluations; the baseline has no training to repeat."""
    found = [cell for cell in cells("table1", "night") if cell.keys["metric"] == "math500"]
    seeds = {method: [c.seed for c in found if c.keys["method"] == method] for method in ("baseline", "pte")}
    assert seeds == {"baseline": [None], "pte": [42, 43, 44]}
    runs = [run for run in needed("table1", "night") if run.run == "pte"]
    assert {run.seed for run in runs} == {42, 43, 44} and all(f"pte-seed{run.seed}" in run.folder for run in runs)
    assert {run.options[-2:] for run in runs if isinstance(run, TrainingRun)} == {
        ("--seed", str(seed)) for seed in (42, 43, 44)
    }
    assert [c.seed for c in cells("table1", "night") if c.source is None] == [None] * 4  # averages


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("item", ITEMS)
def test_no_two_settings_share_a_folder_and_no_number_is_forgotten(item, scale):
    found = cells(item, scale)
    assert len({(cell.seed, *cell.keys.items()) for cell in found}) == len(found)
    by_folder = {}
    for source in sources(item, scale):
        assert by_folder.setdefault(source.folder, source) == source


@pytest.mark.parametrize("scale", [*SCALES[:-1], pytest.param(SCALES[-1], marks=pytest.mark.thorough)])
def test_every_command_of_the_plan_parses(scale, monkeypatch):
    monkeypatch.chdir(ROOT)
    training, evaluation = commands(scale, "recipes/grpo_pte.py"), commands(scale, "recipes/evaluate.py")
    assert (len(training), len(evaluation)) == COUNTS[scale]
    at = BY_NAME[scale]
    for argv in training:
        script, args = parse_recipe([*argv, "--use_cpu", "true", "--bf16", "false"])
        variant = args.output_dir.rsplit("/", 1)[1]
        variant, _, seed = variant.partition("-seed")
        assert args.method == variant.partition("-")[0] and args.seed == int(seed or 42)
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == at.completions  # one process
        assert script.use_global_tokens == (variant != "pte-global_0")
        assert script.encode_evicted == (variant != "pte-global_only")
    for argv in evaluation:
        if any("-seed43" in word or "-seed44" in word for word in argv):
            continue  # they differ in the adapter's folder
        (args,) = parse((EvaluationArguments,), argv)
        assert args.model_name_or_path
        assert (args.adapter is None) == ("/baseline/" in args.output_dir)


@pytest.mark.parametrize("scale", SCALES)
def test_make_plans_every_item(scale, tmp_path):
    """Only what make prints: nothing is run, and nothing of an earlier run is looked at."""
    done = plan_of("reproduce-all", scale, tmp_path)
    assert done.returncode == 0, done.stderr
    counts = tuple(done.stdout.count(f"recipes/{script}.py") for script in ("grpo_pte", "evaluate"))
    assert counts == COUNTS[scale]
    assert done.stdout.count("experiments.paper.render") == len(ITEMS)
    assert done.stdout.count("experiments.tiny.pretrain") == scale.endswith("tiny")
    assert not (tmp_path / "outputs" / scale / "train").exists()


@pytest.mark.parametrize("gpus", [8, 32])
def test_a_rollout_of_lora_spans_no_optimizer_step(monkeypatch, tmp_path, gpus):
    """It decodes some micro-batches at once, on however many GPUs share the paper's global batch."""
    monkeypatch.chdir(ROOT)
    planned = plan_of("reproduce-table1", "paper", tmp_path, f"GPUS={gpus}").stdout.splitlines()
    trainings = [shlex.split(line) for line in planned if "recipes/grpo_pte.py" in line]
    at_once = {}
    for argv in trainings:
        after = argv[argv.index("recipes/grpo_pte.py") + 1 :]
        args = parse_recipe([*after, "--use_cpu", "true", "--bf16", "false"])[1]
        own = accumulation_steps(args.global_batch, args.per_device_train_batch_size, gpus)
        if args.method == "lora":
            assert own % args.steps_per_generation == 0
            at_once[args.per_device_train_batch_size] = args.steps_per_generation
        else:
            assert "--steps_per_generation" not in argv
    assert at_once == {8: {8: 8, 4: 8}, 32: {8: 2, 4: 4}}[gpus]


def test_make_launches_on_as_many_gpus_as_it_is_told(tmp_path):
    done = plan_of("reproduce-tableA1", "paper", tmp_path, "GPUS=4")
    assert "--num_processes 4 " in done.stdout and "accumulation" not in done.stdout


def without_make() -> dict[str, str]:
    """The environment without what a make above the tests has set."""
    return {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}


def plan_of(
    target: str, scale: str, tmp_path: Path, *variables: str, run: bool = False
) -> subprocess.CompletedProcess:
    """What make prints for a target, in a folder with the project's files; with `run` it is made."""
    locks = [path.name for path in ROOT.glob("requirements*.lock")]
    for name in ("Makefile", "pte_trl", "experiments", "recipes", "pyproject.toml", *locks):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    environment = without_make()
    command = ["make", target, f"SCALE={scale}", f"PYTHON={sys.executable}", f"VENV={tmp_path}/venv", *variables]
    command += [] if run else ["-n"]
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


@pytest.mark.parametrize("module", ["experiments.study.plan", "experiments.paper.targets"])
def test_a_plan_needs_no_environment(module):
    """`-S` leaves site-packages out: make asks for the plans before anything is installed."""
    command = [sys.executable, "-S", "-m", module, "tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={})
    assert done.returncode == 0 and "recipes/evaluate.py" in done.stdout, done.stderr
