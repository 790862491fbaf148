"""Checkpoints are atomic, and a run that was killed anywhere resumes as if it had not been."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pte_trl.runtime.checkpoints import LISTING, complete, fault_of, rotate, seal
from pte_trl.runtime.resume import newest, put_aside, starting_point
from pte_trl.training.arguments import parse_recipe
from tests.kill_matrix import KILLS, Kill, kill_and_resume, on
from tests.launches import ENGINES, arguments, course, gap, run
from tests.test_recipes import recipe

SETTINGS = {"method": "pte", "learning_rate": 1e-3, "max_steps": 6}


def checkpoint(folder: Path, step: int, settings: dict | None = None) -> Path:
    """A sealed checkpoint with two files."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(b"x" * 100)
    (path / "trainer_state.json").write_text("{}")
    about = {"step": step, "processes": 1, "engine": "one copy on every rank"}
    seal(path, about | {"settings": SETTINGS if settings is None else settings})
    return path


def args_of(folder: Path, resume: str = "auto", **changes) -> SimpleNamespace:
    """The arguments that a starting point depends on."""
    batch = {"steps_per_generation": 1, "num_iterations": 1, "gradient_accumulation_steps": 1}
    return SimpleNamespace(**{"output_dir": str(folder), "resume": resume, "world_size": 1, **batch, **changes})


# ---- complete or not -------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    (path / "optimizer.pt").write_bytes(b"x" * 50)


BROKEN = {
    "optimizer.pt has 50 bytes instead of 100": truncate,
    "trainer_state.json is missing": lambda path: (path / "trainer_state.json").unlink(),
    f"has no {LISTING}": lambda path: (path / LISTING).unlink(),
    f"its {LISTING} cannot be read": lambda path: (path / LISTING).write_text('{"files"'),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_checkpoint_is_skipped_with_a_message(tmp_path, message):
    checkpoint(tmp_path, 2)
    BROKEN[message](checkpoint(tmp_path, 10))  # 10 comes after 2 by number, before it by name
    said = []
    assert newest(tmp_path, 1, said.append) == tmp_path / "checkpoint-2"
    assert len(said) == 1 and "checkpoint-10 is skipped" in said[0] and message in said[0]


def test_rotation_counts_complete_checkpoints_only(tmp_path):
    for step in (2, 4, 6, 8, 10):
        checkpoint(tmp_path, step)
    truncate(tmp_path / "checkpoint-8")
    truncate(tmp_path / "checkpoint-10")
    rotate(tmp_path, 2)
    assert complete(tmp_path) == [tmp_path / "checkpoint-4", tmp_path / "checkpoint-6"]
    rotate(tmp_path, 1, best=str(tmp_path / "checkpoint-4"))
    assert complete(tmp_path) == [tmp_path / "checkpoint-4", tmp_path / "checkpoint-6"]
    rotate(tmp_path, 1)
    assert complete(tmp_path) == [tmp_path / "checkpoint-6"]
    rotate(tmp_path, None)
    assert complete(tmp_path) == [tmp_path / "checkpoint-6"]


def test_a_checkpoint_without_a_ranks_part_is_not_sealed(tmp_path):
    (tmp_path / "rng_state_0.pth").touch()
    with pytest.raises(FileNotFoundError, match="what rank 1 wrote is not here"):
        seal(tmp_path, {"processes": 2})
    assert fault_of(tmp_path)


# ---- where a run resumes ---------------------------------------------------------------------------------------


def test_auto_takes_the_newest_and_never_begins_anew(tmp_path):
    assert starting_point(args_of(tmp_path / "not_there"), SETTINGS) is None
    for step in (2, 4):
        checkpoint(tmp_path, step)
    (tmp_path / "manifest.json").touch()
    assert starting_point(args_of(tmp_path), SETTINGS | {"max_steps": 9}) == tmp_path / "checkpoint-4"
    assert starting_point(args_of(tmp_path, "never"), SETTINGS) is None
    assert sorted(path.name for path in (tmp_path / "earlier-1").iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "manifest.json",
    ]
    assert starting_point(args_of(tmp_path), SETTINGS) is None  # or a killed second run would take up the first


def test_a_path_puts_later_checkpoints_aside(tmp_path):
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    start = tmp_path / "checkpoint-4"
    assert starting_point(args_of(tmp_path, str(start)), SETTINGS) == start
    assert complete(tmp_path) == [tmp_path / "checkpoint-2", start]
    assert (tmp_path / "earlier-1/checkpoint-6").is_dir()
    other = tmp_path / "other"
    checkpoint(other, 1)
    assert starting_point(args_of(other, str(start)), SETTINGS) == start
    assert complete(other) == []


def test_other_settings_are_refused_unless_the_checkpoint_is_named(tmp_path):
    start = checkpoint(tmp_path, 2)
    with pytest.raises(
        ValueError, match=r"checkpoint-2 is of a run with other settings \(method: 'pte' -> 'lora_c'\)"
    ):
        starting_point(args_of(tmp_path), SETTINGS | {"method": "lora_c"})
    said = []
    assert starting_point(args_of(tmp_path, str(start)), SETTINGS | {"learning_rate": 1e-4}, said.append) == start
    assert said[0] == "resumes under other settings: learning_rate: 0.001 -> 0.0001"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 4}, "processes: 1 -> 4"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, "engine: one copy on every rank -> ZeRO-2"),
        ({"resume": "nowhere"}, "resume='nowhere': no such folder"),
    ],
)
def test_what_cannot_go_on_is_refused(tmp_path, changes, message):
    checkpoint(tmp_path, 2)
    with pytest.raises(ValueError, match=message):
        starting_point(args_of(tmp_path, **changes), SETTINGS)


def test_a_broken_checkpoint_that_is_named_is_refused(tmp_path):
    start = checkpoint(tmp_path, 2)
    truncate(start)
    with pytest.raises(ValueError, match=r"optimizer\.pt has 50 bytes instead of 100"):
        starting_point(args_of(tmp_path, str(start)), SETTINGS)


def test_a_checkpoint_inside_a_generation_batch_is_skipped(tmp_path):
    """The one at the end of a run can be."""
    for step in (4, 5):
        checkpoint(tmp_path, step)
    said = []
    start = starting_point(args_of(tmp_path, steps_per_generation=2), SETTINGS, said.append)
    assert start == tmp_path / "checkpoint-4" and "inside a generation batch of 2 steps" in said[0]


def test_putting_aside_twice_keeps_both(tmp_path):
    for number in (1, 2):
        checkpoint(tmp_path, 2)
        put_aside(tmp_path, -1)
        assert (tmp_path / f"earlier-{number}/checkpoint-2").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save_steps": 3, "steps_per_generation": 4}, "save_steps=3: would split a generation batch.*multiples of 4"),
        ({"save_steps": 3, "num_iterations": 2}, "multiples of 2"),
        ({"save_steps": 0.5, "num_iterations": 2}, "save_steps=0.5"),
        ({"save_steps": 2, "num_iterations": 3, "gradient_accumulation_steps": 2}, "multiples of 3"),
    ],
)
def test_save_steps_that_split_a_generation_batch_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(recipe(tmp_path, save_strategy="steps", **changes))
    # The best checkpoint is written where it is evaluated.
    changes = {{"save_steps": "eval_steps"}.get(key, key): value for key, value in changes.items()}
    best = {"save_strategy": "best", "metric_for_best_model": "eval_reward", "eval_strategy": "steps"}
    with pytest.raises(ValueError, match=message.replace("save_steps", "eval_steps")):
        parse_recipe(recipe(tmp_path, **best, **changes))


@pytest.mark.parametrize(
    "changes", [{"save_steps": 8, "steps_per_generation": 4}, {"save_steps": 1}, {"save_steps": 2}]
)
def test_save_steps_that_fit(tmp_path, changes):
    """They are taken as they are, and a run resumes from a checkpoint at such a step."""
    _, args = parse_recipe(recipe(tmp_path, save_strategy="steps", **changes))
    assert (args.save_strategy, args.save_steps) == ("steps", changes["save_steps"])
    batch = {key: getattr(args, key) for key in ("steps_per_generation", "num_iterations")}
    path, said = checkpoint(tmp_path / "out", args.save_steps), []
    assert starting_point(args_of(tmp_path / "out", **batch), SETTINGS, said.append) == path
    assert not any("generation batch" in line for line in said)


def test_save_steps_of_a_run_that_saves_nothing_may_be_anything(tmp_path):
    _, args = parse_recipe(recipe(tmp_path, save_steps=3, steps_per_generation=4))
    assert (args.save_strategy, args.save_steps, args.steps_per_generation) == ("no", 3, 4)


def test_checkpoints_by_the_clock_are_for_resuming_too(tmp_path):
    with pytest.raises(ValueError, match="save_only_model=true: such a checkpoint cannot be resumed"):
        parse_recipe(recipe(tmp_path, save_only_model=True, save_minutes=30))


def test_the_trainers_own_key_is_not_taken(tmp_path):
    with pytest.raises(ValueError, match="resume_from_checkpoint='auto': not used; resume is auto, never or a PATH"):
        parse_recipe(recipe(tmp_path, resume_from_checkpoint="auto"))


# ---- killed for real -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def unkilled(place):
    """Output folders of runs that nobody killed, one an engine, made when first asked for."""

    def of(engine: str, **changes) -> str:
        name = "-".join(["unkilled", engine, *map(str, changes)])
        if not (place / name).exists():
            done = run(place, name, "", ENGINES[engine], **changes)
            assert done.codes == [0] * len(done.codes), done.text[-3000:]
            moved = [entry["grad_norm"] > 0 for entry in course(place / name)["metrics"]]
            assert len(moved) == 6 and sum(moved) >= 4  # or equal courses would say nothing
        return name

    return of


# By default a kill while a checkpoint is written. Signals, and several processes: below, and tests/test_slurm.py.
ALWAYS = [("one", Kill("saving", 5, 0, "SIGKILL", 2))]
CASES = [
    *ALWAYS,
    ("one", Kill("backward", 3, 0, "SIGINT", 3)),
    ("zero2", Kill("saving", 5, 1, "SIGKILL", 2)),
    ("ddp", Kill("rollout", 4, 1, "SIGKILL", 2)),
    ("ddp", Kill("rollout", 3, 1, "SIGTERM", 3)),
    *[("one", kill) for kill in KILLS if kill.signal == "SIGKILL" and kill.moment != "optimizer" and kill.step != 1],
    ("ddp", Kill("saving", 5, 0, "SIGKILL", 2)),
]
CASES = list(dict.fromkeys((engine, on(kill, ENGINES[engine]["processes"])) for engine, kill in CASES))
CLASSES = {
    "one": {"world": 1},
    "ddp": {"world": 2, "wrapped": "DistributedDataParallel"},
    "zero2": {"world": 2, "optimizer": "DeepSpeedZeroOptimizer"},
}


@pytest.mark.parametrize(
    ("engine", "kill"),
    [pytest.param(*case, marks=[] if case in ALWAYS else pytest.mark.thorough) for case in CASES],
    ids=[f"{engine} {kill.fault}" for engine, kill in CASES],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(place, unkilled, engine, kill):
    """Metrics, prompts, sampled texts, advantages and final weights, bit by bit."""
    row = kill_and_resume(place, engine, kill, unkilled(engine))
    seen = json.loads((place / unkilled(engine) / "engine.json").read_text())
    assert {key: seen[key] for key in CLASSES[engine]} == CLASSES[engine]
    assert row["step"] == kill.resumes, row["resumed"].text[-3000:]
    assert row["gap"] == []
    if kill.signal != "SIGKILL":
        assert row["codes"] == [128 + signal.Signals[kill.signal]] * len(row["codes"])
        assert f"stopped by {kill.signal} at step {kill.resumes}" in row["text"] and "Traceback" not in row["text"]
    else:
        assert row["codes"][kill.rank] == -signal.SIGKILL
        assert all(row["codes"]) and row["seconds"] < 60
        for rank, text in enumerate(row["text_of"]):
            assert rank == kill.rank or f"rank {rank}: another rank is lost" in text


def test_sigterm_waits_for_the_end_of_a_generation_batch(place, unkilled):
    """In step 3 of batches of two steps: the checkpoint is that of step 4."""
    changes = {"steps_per_generation": 2, "save_strategy": "no"}
    whole = unkilled("one", **changes)
    stopped = run(place, "mid-batch", "backward:3:0:SIGTERM", **changes)
    assert stopped.codes == [128 + signal.SIGTERM] and "at step 4" in stopped.text
    assert run(place, "mid-batch", **changes).codes == [0]
    assert gap(course(place / "mid-batch", 4), course(place / whole, 4)) == []


def test_a_finished_run_is_said_to_be_finished(place, unkilled):
    shutil.copytree(place / unkilled("one"), place / "finished")
    before = (place / "finished/manifest.json").stat().st_mtime
    again = run(place, "finished")
    assert again.codes == [0] and "finished holds this run, finished; resume=never trains it anew" in again.text
    assert (place / "finished/manifest.json").stat().st_mtime == before
    other = run(place, "finished", learning_rate=1e-4)
    assert other.codes == [1]
    assert "finished holds a finished run with other settings (learning_rate: 0.001 -> 0.0001)" in other.text


class Poison:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_poisoned_checkpoint_of_zero_ends_the_run_and_runs_nothing(place, unkilled):
    """By the recipe, on two processes; whoever changed the file has made the listing agree."""
    shutil.copytree(place / unkilled("zero2") / "checkpoint-6", place / "foreign/checkpoint-6")
    start = place / "foreign/checkpoint-6"
    (poisoned,) = start.rglob("mp_rank_00_model_states.pt")
    state = torch.load(poisoned, weights_only=False)
    torch.save(state | {"poison": Poison(place / "marker")}, poisoned)
    listing = start / LISTING
    about = {key: value for key, value in json.loads(listing.read_text()).items() if key != "files"}
    listing.unlink()
    seal(start, about)
    done = run(place, "from-foreign", "", ENGINES["zero2"], resume=str(start), max_steps=8)
    assert done.codes == [1, 1] and not (place / "marker").exists()
    assert "error: a file of the checkpoint names code to be run when it is read" in done.text


# ---- by the launcher -------------------------------------------------------------------------------------------


def launch(place: Path, output: str, fault: str = "", **options) -> subprocess.Popen:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = place / "two.yaml"
    config.write_text('distributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 2\nmixed_precision: "no"\n')
    program = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(config)]
    program += ["--main_process_port", str(port), "-m", "tests.faulty", *arguments(output, 2)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FAULT": fault} | options
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(program, cwd=place, env=environment, **pipes)


@pytest.mark.thorough  # of SIGTERM to launchers, tests/test_slurm.py
def test_under_accelerate_launch(place, unkilled):
    """SIGTERM to the launcher, then SIGKILL to a rank, then to the end: equal to a run without either."""
    stopped = launch(place, "launched", "backward:1:0:LAUNCHER-SIGTERM", PET_SHUTDOWN_TIMEOUT="90")
    try:
        text, _ = stopped.communicate(timeout=120)
        assert "stopped by SIGTERM at step" in text and stopped.returncode != 0
    finally:
        stopped.kill()
    (reached,) = complete(place / "launched")
    step = int(reached.name.rsplit("-", 1)[1])
    killed = launch(place, "launched", f"backward:{step + 1}:1:SIGKILL")
    try:
        text, _ = killed.communicate(timeout=120)
        assert killed.returncode != 0 and "Signal 9 (SIGKILL)" in text
    finally:
        killed.kill()
    last = launch(place, "launched")
    try:
        text, _ = last.communicate(timeout=120)
        assert last.returncode == 0, text[-3000:]
    finally:
        last.kill()
    assert f"resumes from launched/checkpoint-{step}" in text
    assert gap(course(place / "launched", step), course(place / unkilled("ddp"), step)) == []
