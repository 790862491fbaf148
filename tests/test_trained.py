"""Every way of training to nothing, or to what is no adapter: an error, and nothing that looks finished."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from experiments.tiny.model import build
from experiments.tiny.task import DIFFICULTIES, rows
from pte_trl.runtime.checkpoints import checkpoints
from pte_trl.runtime.faults import Fault
from pte_trl.runtime.ownership import Owner
from pte_trl.runtime.resume import is_finished
from pte_trl.runtime.trained import check_enough, prompts_per_batch
from pte_trl.training import grpo as grpo_pte
from pte_trl.training import run as course
from pte_trl.training.arguments import parse_recipe
from pte_trl.training.distill import script as distill_pte
from pte_trl.training.distill.completions import check_new_file
from pte_trl.training.mixin import BoundedTrainer
from tests.models import tiny, with_pte
from tests.test_recipes import ROOT, recipe


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """An untrained model with sums as its data."""
    folder = tmp_path_factory.mktemp("trained")
    model, tokenizer = build(seed=0)
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    (folder / "sums.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows("train", 8, 0, DIFFICULTIES["easy"]))
    )
    return folder


def argv(setting, out, name: str, **changes) -> list[str]:
    options = {
        "config": ROOT / f"recipes/{name}.yaml",
        "model_name_or_path": setting / "model",
        "dataset_name": setting / "sums.jsonl",
        "output_dir": out,
        "per_device_train_batch_size": 8,
        "max_completion_length": 24,
        "max_steps": 1,
    } | changes
    return [str(part) for key, value in options.items() for part in (f"--{key}", value)]


def left(out) -> list[str]:
    """What there is that could be taken for a result."""
    names = ("manifest.json", "adapter_model.safetensors", "trainer_state.json", "checkpoint-*", ".owner")
    return [path.name for name in names for path in out.glob(name)]


# ---- no steps --------------------------------------------------------------------------------------------------

LENGTHS = [
    ({"max_steps": 0}, "max_steps=0: must be an integer of at least 1, or -1"),
    ({"max_steps": -5}, "max_steps=-5: must be"),
    ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs=0: must be a finite number above 0"),
    ({"max_steps": -1, "num_train_epochs": -2.0}, "num_train_epochs=-2.0: must be a finite number above 0"),
    ({"max_steps": -1, "num_train_epochs": float("inf")}, "num_train_epochs=inf"),
    ({"max_steps": -1, "num_train_epochs": float("nan")}, "num_train_epochs=nan"),
]


@pytest.mark.parametrize(("changes", "message"), LENGTHS)
def test_lengths_of_no_training_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(recipe(tmp_path, **changes))


FEW = [
    ("tiny", grpo_pte, {"dataset_limit": 1, "num_generations": 4}, "has 1 prompts and a generation batch takes 2"),
    ("tiny", grpo_pte, {"num_generations": 2, "steps_per_generation": 4}, "has 8 prompts and .* takes 16"),
    ("distill_tiny", distill_pte, {"dataset_limit": 7}, "has 7 prompts and a generation batch takes 8"),
    ("distill_tiny", distill_pte, {"gradient_accumulation_steps": 2}, "has 8 prompts and .* takes 16"),
]


@pytest.mark.parametrize(("name", "script", "changes", "message"), FEW)
def test_too_few_prompts_for_one_step_are_refused_before_the_weights_load(
    setting, tmp_path, monkeypatch, name, script, changes, message
):
    monkeypatch.setattr(course, "load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit, match=f"error: the training set {message}, so not one step could be made"):
        script.main(argv(setting, tmp_path, name, **changes))
    assert left(tmp_path) == []


def test_just_enough_prompts_are_enough(tmp_path):
    _, args = parse_recipe(recipe(tmp_path, per_device_train_batch_size=8, num_generations=4, max_steps=1))
    assert prompts_per_batch(args) == 2
    check_enough(args, 2)
    with pytest.raises(ValueError, match="has 1 prompts"):
        check_enough(args, 1)


@pytest.mark.parametrize(("done", "asked", "saved"), [(0, -1, False), (0, 5, False), (3, 5, False), (5, 5, True)])
def test_a_run_that_ended_too_early_is_not_saved_as_finished(tmp_path, done, asked, saved):
    """Whatever it was that ended it: the trainer is asked how many steps it made."""
    folder = tmp_path / "out"
    folder.mkdir()
    state = SimpleNamespace(global_step=done, save_to_json=lambda path: open(path, "w").close())
    args = SimpleNamespace(output_dir=str(folder), max_steps=asked, device="cpu", world_size=1)
    accelerator = SimpleNamespace(is_main_process=True, device="cpu", num_processes=1)
    control = SimpleNamespace(should_training_stop=False)
    trainer = SimpleNamespace(args=args, state=state, accelerator=accelerator, control=control, model=tiny())
    trainer.settings = {}
    trainer.save_model = lambda path: open(f"{path}/adapter_model.safetensors", "w").close()
    if saved:
        BoundedTrainer.save_run(trainer)
        assert (folder / "manifest.json").exists()
        return
    with pytest.raises(Fault, match=f"{done} steps were made"):
        BoundedTrainer.save_run(trainer)
    assert not list(folder.iterdir())


# ---- numbers that are not finite -------------------------------------------------------------------------------


@pytest.mark.parametrize("save", ["no", "steps"])
def test_a_spoilt_adapter_is_never_saved(setting, tmp_path, save):
    """A rate at which one step makes all weights infinite, by the recipe; at the end and in a checkpoint."""
    flags = {"learning_rate": 1e300, "save_strategy": save, "save_steps": 1}
    with pytest.raises(
        SystemExit, match=r"error: step 1, rank 0: the adapter is not finite, first in .*pte_.*1e\+300"
    ):
        distill_pte.main(argv(setting, tmp_path, "distill_tiny", **flags))
    assert left(tmp_path) == [] and checkpoints(tmp_path) == []


@pytest.fixture(scope="module", params=["pte", "lora"])
def adapter(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = with_pte(tiny(dtype=torch.float32)) if request.param == "pte" else lora()
    model.save_pretrained(folder)
    return folder


def lora():
    return get_peft_model(tiny(dtype=torch.float32), LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))


def changed(adapter, tmp_path, change) -> None:
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    save_file(change(load_file(adapter / "adapter_model.safetensors")), tmp_path / "adapter_model.safetensors")


# ---- where a run lives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "script"), [("tiny", grpo_pte), ("distill_tiny", distill_pte)])
def test_two_trainings_do_not_share_a_folder(setting, tmp_path, name, script):
    owner = Owner(tmp_path)
    with pytest.raises(SystemExit, match=r"error: .*: this process is writing there; wait for it or end it, or take"):
        script.main(
            argv(setting, tmp_path, name, num_generations=4) if name == "tiny" else argv(setting, tmp_path, name)
        )
    owner.release()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: \S+/file: .* is a file where a folder is needed"):
        script.main(argv(setting, tmp_path / "file", name))


def test_completions_have_an_owner(setting, tmp_path):
    owner = Owner(tmp_path / "rows.jsonl", file=True)
    with pytest.raises(SystemExit, match=r"rows\.jsonl: this process is writing there"):
        distill_pte.main(argv(setting, tmp_path, "distill_tiny", sample_to=tmp_path / "rows.jsonl"))
    owner.release()


@pytest.mark.parametrize("file", ["manifest.json", "trainer_state.json"])
@pytest.mark.parametrize("content", ["", "{", "5", "[]", "{}"])
def test_a_finished_run_that_cannot_be_read_is_said_so(tmp_path, file, content):
    (tmp_path / "manifest.json").write_text('{"settings": {"method": "pte"}}')
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2}')
    args = SimpleNamespace(output_dir=str(tmp_path), resume="auto", max_steps=2, process_index=0)
    assert is_finished(args, {"method": "pte"})
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=rf"{file}: damaged \(.*\); resume=never puts the earlier run aside"):
        is_finished(args, {"method": "pte"})


def test_epochs_decide_whether_a_run_is_finished_only_where_they_decided_its_length(tmp_path):
    settings = {"method": "pte", "num_train_epochs": 3.0}
    args = SimpleNamespace(output_dir=str(tmp_path), resume="auto", max_steps=-1, process_index=0)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2}')
    for steps in (-1, 2):
        before = settings | {"max_steps": steps}
        (tmp_path / "manifest.json").write_text(json.dumps({"settings": before}))
        assert is_finished(args, settings | {"max_steps": -1}) is (steps == -1)


# ---- completions -----------------------------------------------------------------------------------------------


def test_completions_go_to_a_new_file_only(tmp_path):
    with pytest.raises(ValueError, match=r"sample_to='.*': is a folder; allowed is a file that does not exist yet"):
        check_new_file(str(tmp_path))
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(ValueError, match=r"exists already; completions=\S+rows\.jsonl distils on it, and to sample"):
        check_new_file(str(tmp_path / "rows.jsonl"))
    check_new_file(str(tmp_path / "new.jsonl"))
