"""No checkpoint can run code, whoever wrote it, and no recipe by the environment."""

import inspect
import itertools
import os
import pickle
import re
import shutil

import pytest
import torch
import transformers.trainer
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from pte_trl.compat.engines import checkpoint_records
from pte_trl.rewards.worker import Comparison
from pte_trl.rewards.worker_pool import WorkerPool
from pte_trl.runtime.checkpoints import LISTING, fault_of, seal, tensors_only
from pte_trl.runtime.resume import newest, starting_point
from pte_trl.settings.environment import check_environment
from pte_trl.training.arguments import parse_recipe
from tests.test_recipes import recipe
from tests.test_resume import Poison, args_of, checkpoint


def test_the_poison_works_where_nothing_is_in_its_way(tmp_path):
    torch.save({"step": Poison(tmp_path / "marker")}, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("weights_only", [False, None])
def test_no_load_runs_it(tmp_path, legacy, weights_only):
    torch.save({"step": Poison(tmp_path / "marker")}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with tensors_only(), pytest.raises(pickle.UnpicklingError, match="system"):
        torch.load(tmp_path / "x.pt", weights_only=weights_only)
    assert not (tmp_path / "marker").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_deepspeeds_own_loader_runs_nothing_and_reads_its_records(tmp_path):
    engine = TorchCheckpointEngine()
    records = {kind.__name__: make(kind) for kind in checkpoint_records()}
    engine.save({"tensor": torch.ones(2), **records}, str(tmp_path / "good.pt"))
    engine.save({"tensor": torch.ones(2), "poison": Poison(tmp_path / "marker")}, str(tmp_path / "bad.pt"))
    with tensors_only():
        assert set(engine.load(str(tmp_path / "good.pt"))) == {"tensor", *records}
        with pytest.raises(pickle.UnpicklingError):
            engine.load(str(tmp_path / "bad.pt"))
    assert not (tmp_path / "marker").exists()


def make(kind: type):
    """A value of one of DeepSpeed's records."""
    values = {"ZeroStageEnum": (2,), "fragment_address": (1, 0), "LossScaler": (1,)}
    values["DynamicLossScaler"] = (2.0**16, 2.0, 1000, 1.0, 2, False)
    return kind(*values[kind.__name__])


def test_transformers_unpickles_nothing_on_its_way():
    """Its own calls ask for tensors only; one that does not, in another version, fails here."""
    source = inspect.getsource(transformers.trainer)
    calls = re.findall(r"torch\.load\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)", source)
    assert len(calls) == source.count("torch.load(") > 5
    assert all("weights_only=True" in call for call in calls)
    for name in ("_prepare_for_training", "_load_best_model"):
        assert callable(getattr(transformers.Trainer, name))
    loads = re.findall(r"def (\w+)|deepspeed_load_checkpoint\(", source)
    owners = {name for name, after in itertools.pairwise(loads) if name and not after}
    assert owners == {"_prepare_for_training", "_load_best_model"}


def test_a_file_that_was_changed_is_found_by_its_hash(tmp_path):
    path = checkpoint(tmp_path, 2)
    (path / "optimizer.pt").write_bytes(b"y" * 100)
    assert fault_of(path) is None  # as large as before
    assert fault_of(path, contents=True) == "optimizer.pt has been changed since it was written"
    said = []
    assert newest(tmp_path, 1, said.append) is None and "has been changed" in said[0]
    with pytest.raises(ValueError, match=r"checkpoint-2'?: optimizer\.pt has been changed since it was written"):
        starting_point(args_of(tmp_path, str(path)), {})


def test_torchs_sharded_index_is_neither_written_nor_read(tmp_path):
    path = tmp_path / "checkpoint-2"
    (path / "optimizer_0").mkdir(parents=True)
    (path / "optimizer_0/.metadata").write_bytes(pickle.dumps(Poison(tmp_path / "marker")))
    about = {"processes": 1, "engine": "FSDP", "settings": {}}
    with pytest.raises(ValueError, match="FULL_STATE_DICT"):
        seal(path, about)
    path = checkpoint(tmp_path, 4)
    shutil.copytree(tmp_path / "checkpoint-2/optimizer_0", path / "optimizer_0")
    with pytest.raises(ValueError, match=r"\.metadata: could run any code when it is read"):
        starting_point(args_of(tmp_path, str(path)), {})


@pytest.mark.parametrize("listing", ["5", "[]", "{}", '{"files": 5}', '{"files": {"optimizer.pt": null}}', "\xff"])
def test_a_listing_that_is_none_is_said(tmp_path, listing):
    path = checkpoint(tmp_path, 2)
    (path / LISTING).write_bytes(listing.encode("latin-1"))
    assert f"its {LISTING} cannot be read" in (fault_of(path) or "")


# ---- a recipe's environment ------------------------------------------------------------------------------------

RUNS_CODE = ["PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "PATH", "HOME"]
RUNS_CODE += ["CC", "CXX", "NCCL_NET_PLUGIN", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "GIT_EXTERNAL_DIFF"]
RUNS_CODE += ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "HF_ENDPOINT", "HF_MODULES_CACHE", "pythonpath", "BASH_ENV", "X"]


@pytest.mark.parametrize("name", RUNS_CODE)
def test_a_recipe_does_not_set_what_could_run_code(tmp_path, name, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=f"env: {name}='/x': a recipe may not set it"):
        parse_recipe(recipe(tmp_path, env={name: "/x"}))
    assert name not in os.environ


def test_a_variable_is_text_or_a_number():
    with pytest.raises(ValueError, match=r"env: OMP_NUM_THREADS=.*: must be text or a number"):
        check_environment({"OMP_NUM_THREADS": {"a": 1}})


def test_what_a_recipe_may_set_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "")
    parse_recipe(recipe(tmp_path, env={"NCCL_DEBUG": "INFO"}))
    assert os.environ["NCCL_DEBUG"] == "INFO"
    with pytest.raises(ValueError, match="must hold"):
        parse_recipe(recipe(tmp_path, env=["NCCL_DEBUG"]))


def test_a_graders_worker_runs_nothing_that_the_environment_was_given_since(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    (tmp_path / "sitecustomize.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    (tmp_path / "math_verify.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "sitecustomize.py"))
    monkeypatch.setenv("PYTHONINSPECT", "1")
    pool = WorkerPool(1, 60.0, None)
    assert pool.run([Comparison("$5$", "$5$")])[0].reason == "correct"
    pool.close()
    assert not marker.exists()
