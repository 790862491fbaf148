"""What is published: the files of the wheel, its metadata, and a package that works without its extras."""

import ast
import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from importlib.metadata import files, packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pte_trl.settings.extras import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ABOUT = PROJECT["project"]
PACKAGES = ("pte_trl", "pte_trl_cli")
BUILD = "from setuptools import build_meta as b; print(b.build_wheel('dist')); print(b.build_sdist('dist'))"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and a source distribution of this checkout, built aside."""
    folder = tmp_path_factory.mktemp("build") / "source"
    skip = shutil.ignore_patterns(".*", "outputs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=skip)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,), (source,) = folder.glob("dist/*.whl"), folder.glob("dist/*.tar.gz")
    return zipfile.ZipFile(wheel), tarfile.open(source)


def test_the_wheel_has_the_library_and_nothing_else(built):
    names = built[0].namelist()
    assert {name.split("/")[0] for name in names} == {*PACKAGES, f"pte_trl-{ABOUT['version']}.dist-info"}
    here = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".json")
    }
    assert {name for name in names if not name.startswith("pte_trl-")} == here
    assert "pte_trl/estimate/shapes/qwen2.5-7b/config.json" in here
    assert "pte_trl/evaluation/contaminated.json" in here


def test_the_metadata_of_the_wheel(built):
    wheel = built[0]
    folder = f"pte_trl-{ABOUT['version']}.dist-info"
    about = message_from_bytes(wheel.read(f"{folder}/METADATA"))
    assert about["License-Expression"] == "Apache-2.0" and about["Author"] == "the pte_trl authors"
    assert about["Requires-Python"] == ABOUT["requires-python"]
    assert wheel.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "pte-trl = pte_trl_cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    assert set(about.get_all("Provides-Extra")) == set(ABOUT["optional-dependencies"])


def test_the_source_distribution_has_the_recipes(built):
    names = {name.partition("/")[2] for name in built[1].getnames()}
    assert {"LICENSE", "CHANGELOG.md", "CITATION.cff", "recipes/qwen3b.yaml", "recipes/grpo_pte.py"} <= names


def test_the_licence_is_the_canonical_text():
    (theirs,) = (path for path in files("peft") if path.name == "LICENSE")
    assert (ROOT / "LICENSE").read_text() == theirs.read_text()


def test_version_and_python_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ABOUT["version"] and citation["license"] == ABOUT["license"]
    assert citation["references"][0]["identifiers"][0]["value"].endswith("2602.16839")
    target = PROJECT["tool"]["ruff"]["target-version"]
    assert ABOUT["requires-python"] == f">={target[2]}.{target[3:]}"
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def imports(path: Path) -> dict[str, bool]:
    """Imported top-level packages of others -> whether one of the imports runs when the module is imported."""
    tree, found = ast.parse(path.read_text()), {}
    at_once = {id(node) for statement in tree.body for node in _outside_functions(statement)}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        for name in (name.split(".")[0] for name in names):
            if name not in sys.stdlib_module_names and name not in PACKAGES:
                found[name] = found.get(name, False) or id(node) in at_once
    return found


def _outside_functions(node: ast.AST):
    yield node
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        for child in ast.iter_child_nodes(node):
            yield from _outside_functions(child)


def test_what_is_imported_is_a_dependency_and_extras_are_imported_late():
    owners = packages_distributions()
    everyone = {canonicalize_name(Requirement(line).name) for line in ABOUT["dependencies"]}
    everyone.add("triton")  # torch for GPUs depends on it; its kernels are used where it is there
    wrong = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for name, at_once in imports(path).items():
            needed = {canonicalize_name(owner) for owner in owners.get(name, [name])}
            if not (needed & everyone or (name in EXTRAS and not at_once)):
                wrong[f"{path.relative_to(ROOT)}: {name}"] = at_once
    assert wrong == {}


def test_every_extra_is_in_the_table():
    optional = ABOUT["optional-dependencies"]
    assert set(EXTRAS.values()) == set(optional) - {"all", "dev"}
    for module, extra in EXTRAS.items():
        assert [Requirement(line).name for line in optional[extra]] == [module]


# Run without the packages of all extras, as in an environment that has none of them.
WITHOUT = """
import contextlib, io, json, sys
sys.modules.update(dict.fromkeys({modules}, None))
said = {{}}

def ends(name, call):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            call()
            said[name] = out.getvalue()
        except (SystemExit, ValueError) as error:
            said[name] = f"refused: {{error}}"

import pte_trl
from pathlib import Path
from pte_trl import PteGRPOTrainer, PteDistillationTrainer, smollm2
from pte_trl.training.arguments import parse_recipe
from pte_trl.training.distill.script import main as distill
import pte_trl.estimate.__main__, pte_trl.evaluation.script, pte_trl.inspect.__main__
from pte_trl_cli import doctor, recipes

tiny = ["--config", "{root}/recipes/tiny.yaml"]
ends("parse", lambda: print(parse_recipe(tiny)[1].window))
ends("auto", lambda: print(parse_recipe([*tiny, "--report_to", "auto"])[1].report_to))
ends("trackio", lambda: parse_recipe([*tiny, "--report_to", "trackio"]))
ends("deepspeed", lambda: parse_recipe([*tiny, "--deepspeed", "zero.json"]))
ends("distill", lambda: distill(["--config", "{root}/recipes/distill_tiny.yaml", "--deepspeed", "zero.json"]))
ends("vllm", lambda: parse_recipe([*tiny, "--method", "lora", "--window", "full", "--use_vllm", "true"]))
ends("estimate", lambda: pte_trl.estimate.__main__.main(["--model", "qwen2.5-3b"]))
ends("inspect", lambda: pte_trl.inspect.__main__.main(["{adapter}"]))
ends("gguf", lambda: smollm2.make(Path("{adapter}/none")))
ends("doctor", lambda: doctor.check_machine(["{root}/recipes/qwen3b.yaml"]))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def without_extras(tmp_path_factory) -> dict[str, str]:
    """What commands say where no extra is installed."""
    from tests.models import tiny, with_pte

    folder = tmp_path_factory.mktemp("adapter")
    with_pte(tiny()).save_pretrained(str(folder))
    code = WITHOUT.format(modules=sorted(EXTRAS), root=ROOT, adapter=folder)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_without_extras_the_rest_works(without_extras):
    assert without_extras["parse"].strip() == "16"
    assert without_extras["auto"].strip() == "[]"  # no tracker
    assert "| qwen2.5-3b, pte |" in without_extras["estimate"]
    assert "no GPU" in without_extras["doctor"] and "recipes/qwen3b.yaml  " in without_extras["doctor"]


SENTENCES = {
    "trackio": "report_to='trackio': trackio is not installed; pip install 'pte_trl[tracking]'",
    "deepspeed": "deepspeed='zero.json': deepspeed is not installed; pip install 'pte_trl[deepspeed]'",
    "distill": "error: deepspeed='zero.json': deepspeed is not installed; pip install 'pte_trl[deepspeed]'",
    "vllm": "use_vllm=true: vLLM is not installed; pip install 'pte_trl[vllm]'",
    "inspect": "error: the plots of an inspection: matplotlib is not installed; pip install 'pte_trl[plots]'",
    "gguf": "reading SmolLM2's file: gguf is not installed; pip install 'pte_trl[gguf]'",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_what_needs_an_extra_names_it(without_extras, name):
    assert without_extras[name] == f"refused: {SENTENCES[name]}"
