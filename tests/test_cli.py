"""The console script: commands, messages and exit codes as those of the scripts, and what the doctor finds."""

import ast
import http.server
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

import pte_trl_cli
from pte_trl.estimate.__main__ import job as given_job
from pte_trl.estimate.__main__ import main as estimate_main
from pte_trl.estimate.__main__ import paper_job
from pte_trl.estimate.choice import CONTEXT
from pte_trl.estimate.terms import estimate
from pte_trl_cli import COMMANDS, doctor, machine, main, recipes, versions
from pte_trl_cli.machine import Gpu

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
QWEN = str(ROOT / "recipes/qwen3b.yaml")
# As pip writes it. The grader's workers run it again as their main module.
SCRIPT = "import sys\nfrom pte_trl_cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


@pytest.fixture
def script(tmp_path) -> Path:
    (path := tmp_path / "pte-trl").write_text(SCRIPT)
    return path


def run(script: Path, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


# ---- commands --------------------------------------------------------------------------------------------------


def test_help_and_unknown_commands_import_neither_torch_nor_the_library():
    code = "import sys; from pte_trl_cli import main\ntry:\n    main({argv})\nexcept SystemExit as e:\n    print(e)\n"
    code += "print(sorted({{'torch', 'transformers', 'pte_trl'}} & set(sys.modules)))"
    for argv in ([], ["--help"], ["--version"], ["trian", "--config", "x.yaml"]):
        done = subprocess.run(
            [sys.executable, "-c", code.format(argv=argv)], capture_output=True, text=True, cwd=ROOT, timeout=60
        )
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
        if argv in ([], ["--help"]):
            assert all(f"  {name} " in done.stdout for name in COMMANDS)
        if argv[:1] == ["trian"]:
            assert done.stdout.startswith(f"error: trian: no such command; allowed are {', '.join(COMMANDS)}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_a_main_that_takes_arguments(command):
    module = importlib.import_module(COMMANDS[command][0])
    assert list(inspect.signature(inspect.unwrap(module.main)).parameters) == ["argv"]


def test_the_entry_point_is_the_dispatcher():
    module, _, name = PROJECT["scripts"]["pte-trl"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "doctor"])
def test_help_of_a_command_names_it_and_its_flags(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/pte-trl", command, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: pte-trl {command} " in shown
    flag = {"train": "--window", "distill": "--sample_to", "evaluate": "--benchmarks", "metrics": "--json"}
    flag |= {
        "regrade": "--answer_after",
        "prefix": "--lengths",
        "generate": "--question",
        "inspect": "--evict_ratio",
        "estimate": "--ranks",
    }
    assert flag[command] in shown


REFUSED = {
    ("train", "--config", "no.yaml"): "error: --config no.yaml: no such file",
    ("distill", "--windw", "3"): "error: --windw: no such flag; --help lists those there are",
    ("evaluate", "--model_name_or_path", "./no", "--output_dir", "o", "--benchmarks", "amc23"): "no such folder",
    ("metrics", "nowhere"): "error: no records.jsonl below nowhere",
    ("regrade", "nowhere"): "error: no records.jsonl below nowhere",
    ("prefix", "nowhere", "--lengths", "8"): "error: no records.jsonl below nowhere",
    ("generate", "--model_name_or_path", "m", "--window", "8"): "question=None, file=None: give exactly one",
    ("inspect", "./nowhere"): "nowhere",
    ("estimate", "--model", "nowhere"): "error: model='nowhere': no folder with a config.json; known are ",
}


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_what_is_refused_is_one_sentence(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pte-trl", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code.startswith("error: ") and "\n" not in ended.value.code
    assert REFUSED[words] in ended.value.code


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(COMMANDS, "metrics", ("pte_trl_cli_no_such_module", ""))
    with pytest.raises(SystemExit, match="error: metrics: the package pte_trl_cli_no_such_module is not installed"):
        main(["metrics"])


@pytest.mark.thorough
def test_a_training_by_the_console_script(place, tmp_path, script):
    flags = f"--config {ROOT}/recipes/tiny.yaml --dataset_name {place}/train.jsonl"
    flags += f" --model_name_or_path {place}/outputs/tiny-base --output_dir out"
    flags += " --max_steps 1 --per_device_train_batch_size 8 --max_completion_length 20"
    done = run(script, "train", *flags.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    about = json.loads((tmp_path / "out/manifest.json").read_text())
    assert about["command"].startswith("python pte-trl train --config ")
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def test_recipes_are_thin_and_know_nothing_of_each_other():
    for path in sorted((ROOT / "recipes").glob("*.py")):
        tree = ast.parse(path.read_text())
        named = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)], path
        assert named and all(name.startswith("pte_trl.") for name in named), path
        assert len(path.read_text().splitlines()) < 25, path


def test_estimate_without_the_repository_asks_for_a_model(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.import_module("pte_trl.estimate.__main__"), "RECIPES", tmp_path / "recipes")
    with pytest.raises(SystemExit, match="error: --model: must be given, since the recipes that the tables are of"):
        estimate_main([])


def test_estimate_prints_the_job_of_its_flags(capsys):
    estimate_main(
        ["--model", "qwen2.5-7b", "--completion", "16384", "--ranks", "1", "--replay", "segments", "--offload"]
    )
    line = capsys.readouterr().out.splitlines()[2]
    terms = estimate(given_job("qwen2.5-7b", "pte", completion=16384, ranks=1, replay="segments", offload=True))
    assert line.startswith("| qwen2.5-7b, pte |") and line.endswith(f" {terms['peak'] / 1e9:.1f} |")
    for argv, sentence in {
        ("--ranks", "2"): "error: --ranks: only with --model",
        ("--model", "tiny", "--prompt", "0"): "error: prompt=0: must be an integer of at least 1",
        (
            "--model",
            "tiny",
            "--method",
            "lora",
            "--window",
            "8",
        ): "error: schedule=Schedule\\(window=8, .*: only method=lora has none",
    }.items():
        with pytest.raises(SystemExit, match=sentence):
            estimate_main(list(argv))


# ---- the doctor ------------------------------------------------------------------------------------------------


def test_versions_against_the_ranges_of_the_package():
    lines = [*PROJECT["dependencies"], 'matplotlib>=3.11,<4; extra == "plots"', 'pytest==9.2.0; extra == "dev"']
    found = {each.name: each for each in versions.look(lines)}
    assert [each.sentence for each in found.values()] == [None] * len(found)
    assert found["matplotlib"].extra == "plots" and "pytest" not in found
    bad = ["trl>=99", "no-such-package<2", 'gguf<0.1; extra == "gguf"', 'nothing>=1; extra == "plots"']
    bad += ['never>=1; python_version < "3"']
    sentences = {each.name: each.sentence for each in versions.look(bad)}
    assert re.fullmatch(r"trl: \d+\.\d+\.\d+ is installed; pte_trl needs >=99", sentences["trl"])
    assert sentences["no-such-package"] == "no-such-package: is not installed; pte_trl needs <2"
    assert sentences["gguf"].endswith("is installed; pte_trl needs <0.1")
    assert sentences["nothing"] is None and "never" not in sentences


def test_versions_that_the_checkout_is_tested_with(tmp_path):
    found = versions.pins()
    for name in ("torch", "trl", "transformers", "peft"):
        assert versions.version(name).partition("+")[0] == found[name]
    assert versions.pins(tmp_path / "requirements.txt") == {}


def test_only_what_is_required_ends_with_an_error(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_machine", lambda found: [])
    optional = ['gguf<0.1; extra == "gguf"', 'nothing>=1; extra == "plots"']
    monkeypatch.setattr(versions, "own_metadata", lambda: (optional, ">=3.11"))
    assert doctor.main([]) == 0
    shown = capsys.readouterr()
    assert re.search(r"nothing +- +>=1 +- +pip install 'pte_trl\[plots\]' if needed", shown.out)
    assert re.fullmatch(r"warning: gguf: \S+ is installed; pte_trl needs <0.1\n", shown.err)

    monkeypatch.setattr(doctor, "check_machine", lambda found: pytest.fail("imports what may be missing"))
    monkeypatch.setattr(versions, "own_metadata", lambda: (["no-such-package<2", "another-one"], ">=3.99"))
    assert doctor.main([]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
    assert "error: another-one: is not installed; pte_trl needs any version of it" in errors
    assert errors[0].startswith("error: Python: ") and errors[0].endswith("pte_trl needs >=3.99")


def test_the_doctor_runs_where_torch_is_missing():
    """In a process that has no torch, it says so instead of failing."""
    code = "import sys; sys.modules['torch'] = None\nfrom pte_trl_cli import doctor, versions\n"
    code += "versions.own_metadata = lambda: (['torch-that-is-missing>=2'], '')\nsys.exit(doctor.main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (
        1,
        "error: torch-that-is-missing: is not installed; pte_trl needs >=2\n",
    )


@pytest.fixture
def answering():
    """The address of a server that answers 404."""
    handler = type("Handler", (http.server.BaseHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_hub_is_asked_once(monkeypatch, answering):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", answering)
    assert machine.hub() == ("reachable", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    words, usable = machine.hub()
    assert words.startswith("cannot be reached (") and not usable
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert machine.hub()[0].startswith("not asked, HF_HUB_OFFLINE is set")


def test_memory_of_a_container(tmp_path):
    assert machine.container_memory(tmp_path) == (float("inf"), 0.0)
    (tmp_path / "memory.current").write_text("5\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.container_memory(tmp_path) == (float("inf"), 0.0)
    (tmp_path / "memory.max").write_text("12\n")
    assert machine.container_memory(tmp_path) == (12.0, 5.0)
    free, total = machine.memory()
    assert 0 < free <= total


def test_the_rows_of_gpus(monkeypatch):
    monkeypatch.setattr(machine.torch.version, "cuda", "13.0")
    rows = machine.gpu_rows([Gpu("Card A", int(80e9), int(60e9)), Gpu("Card B", int(80e9), int(79e9))], "570.1")
    assert rows == [
        ("GPU 0", "Card A, 60.0 of 80.0 GB free"),
        ("GPU 1", "Card B, 79.0 of 80.0 GB free"),
        ("torch build", "CUDA 13.0, driver 570.1"),
    ]
    assert machine.gpu_rows([], None)[0] == ("GPU", "no GPU")


@pytest.mark.parametrize(
    ("name", "shape", "micro_batch", "at_once"),
    [("qwen3b", "qwen2.5-3b", 8, 64), ("qwen7b", "qwen2.5-7b", 4, 32), ("llama8b", "llama-8b", 4, 32)],
)
def test_a_recipe_is_estimated_by_what_it_says(name, shape, micro_batch, at_once):
    """Read from the file, by the doctor and by the tables, against the same recipe stated by hand."""
    job = recipes.job_of(str(ROOT / f"recipes/{name}.yaml"), "cuda", ranks=8)
    sizes = {"micro_batch": micro_batch, "rollout_batch": at_once}
    targets = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    written = given_job(shape, "pte", targets=targets, replay="segments", reference=True, engine_stays=True, **sizes)
    assert estimate(job) == pytest.approx(estimate(written), rel=1e-9)
    assert estimate(paper_job(shape, "pte")) == pytest.approx(estimate(written), rel=1e-9)


def test_which_recipe_fits_a_gpu(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Path(QWEN).read_text().replace("replay: segments ", "replay: one_pass "))
    peak = estimate(recipes.job_of(str(recipe), "cuda", ranks=8))["peak"]
    big = Gpu("big", int(80e9), int(80e9))
    assert recipes.fit(str(recipe), [big], 0).verdict == "fits each GPU, 70.0 GB"
    assert recipes.fit(str(recipe), [], 1e12).verdict.startswith("needs a GPU")
    tight = replace(big, free=int(peak))  # the smallest GPU counts, and not all of its memory
    fit = recipes.fit(str(recipe), [*[big] * 7, tight], 0)
    need = re.search(r"does not fit each GPU, .* takes (\d+\.\d) GB with per_device_train_batch_size: 2", fit.verdict)
    assert need and float(need[1]) * 1e9 < 0.9 * peak - CONTEXT
    assert recipes.fit(QWEN, [replace(big, free=int(4e9))], 0).verdict == "does not fit each GPU, 1.6 GB"
    recipe.write_text(Path(QWEN).read_text().replace("replay: segments ", "replay: auto "))
    assert recipes.fit(str(recipe), [big], 0).verdict == "fits each GPU, 70.0 GB"
    fit = recipes.fit(str(recipe), [tight], 0)  # where one pass does not fit, the run will choose segments
    assert fit.verdict.endswith(" GB, in segments") and fit.peak < peak
    larger = str(ROOT / "recipes/qwen7b.yaml")  # whose weights alone are 15 GB
    fit = recipes.fit(larger, [replace(big, free=int(23e9))] * 4, 0)
    assert "accelerate_configs/" in fit.verdict or "GB with" in fit.verdict


def test_a_recipe_for_the_cpu_is_compared_with_the_memory():
    fit = recipes.fit(str(ROOT / "recipes/tiny.yaml"), [Gpu("big", int(80e9), int(79e9))], 4e9)
    assert fit.verdict == "fits the free memory, 4.0 GB" and 0 < fit.peak < 4e9
    assert recipes.fit(str(ROOT / "recipes/tiny.yaml"), [], 1e6).verdict.startswith("does not fit the free memory")


def test_what_cannot_be_estimated_says_why(tmp_path):
    big, other = Gpu("big", int(80e9), int(79e9)), tmp_path / "other.yaml"
    other.write_text(Path(QWEN).read_text().replace("Qwen/Qwen2.5-3B-Instruct", "a/b"))
    assert "model_name_or_path='a/b' is no folder here" in recipes.fit(str(other), [big], 0).verdict
    assert recipes.fit(QWEN, [big] * 3, 0).verdict.startswith("global_batch=512: 3 processes with ")
    other.write_text("windw: 3\n")
    assert recipes.fit(str(other), [big], 0).verdict == "windw=3: no such key; --help lists those there are"
    assert "no such file" in recipes.fit(str(tmp_path / "none.yaml"), [big], 0).verdict
    assert "a distillation" in recipes.fit(str(ROOT / "recipes/distill_tiny.yaml"), [big], 0).verdict


def test_the_known_shapes_are_those_of_the_recipes():
    named = {recipes.read_recipe("config", str(path))["model_name_or_path"] for path in ROOT.glob("recipes/*.yaml")}
    assert named == set(recipes.KNOWN)


def test_without_recipes_it_says_where_they_are(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(versions, "own_metadata", lambda: (PROJECT["dependencies"], PROJECT["requires-python"]))
    assert doctor.main([]) == 0
    shown = capsys.readouterr()
    assert "no folder recipes here" in shown.err and "threads" in shown.out and "memory" in shown.out
    assert pte_trl_cli.usage().startswith("usage: pte-trl COMMAND")
