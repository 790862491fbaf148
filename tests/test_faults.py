"""Every fault is provoked, and named: what happened, at which step, on which rank, to which sample."""

import os
import re
import shutil
import signal

import pytest
import torch
from transformers import TrainerCallback

from experiments.tiny.model import build
from pte_trl.adapter.files import adapter_folder
from pte_trl.data.problems import load_problems
from pte_trl.evaluation.config import ModelSource
from pte_trl.evaluation.loading import check_evaluation_model
from pte_trl.rewards.worker import Comparison
from pte_trl.rewards.worker_pool import WorkerPool
from pte_trl.runtime.checkpoints import checkpoints, complete
from pte_trl.runtime.faults import is_lost_rank
from pte_trl.runtime.finite import FiniteReward, check_finite
from pte_trl.runtime.trackers import TolerantTracker
from pte_trl.training.arguments import parse_recipe
from pte_trl.training.loading import check_model, check_optimizer
from tests.launches import ENGINES, course, gap, run, start
from tests.test_recipes import recipe


def steps_in(folder) -> list[int]:
    return [int(path.name.rsplit("-", 1)[1]) for path in complete(folder)]


# ---- numbers that are not finite -------------------------------------------------------------------------------

PROMPT = r"prompt '.*Find \w\..*'"
SPOILT = [
    ("weights:3:0:nan", f"step 3, rank 0: log-probs of the rollout are not finite.*sample 0, {PROMPT}"),
    ("logps:3:0:inf", f"step 3, rank 0: log-probs are not finite.* in 16 of 16 samples, first in sample 0, {PROMPT}"),
    (
        "gradient:3:0:nan",
        f"step 3, rank 0: the norm of the gradient is nan; .*1 of 16 samples, first sample 2, {PROMPT}",
    ),
    ("reward:3:0:nan", f"step 3, rank 0: format_reward gave nan for sample 1 of 16, {PROMPT}.*completion"),
]


@pytest.mark.parametrize(
    ("fault", "message"),
    [  # log-probs and gradients by default on two ranks, below
        pytest.param(*case, marks=pytest.mark.thorough if case[0].startswith(("logps", "gradient", "reward")) else ())
        for case in SPOILT
    ],
    ids=[fault for fault, _ in SPOILT],
)
def test_a_number_that_is_not_finite_stops_the_run(place, fault, message):
    """The checkpoint of step 2 stays, and nothing is written after it."""
    name = fault.replace(":", "-")
    done = run(place, name, fault)
    assert done.codes == [1]
    assert re.search(f"error: {message}", done.text), done.text[-2000:]
    assert steps_in(place / name) == [2] and checkpoints(place / name) == complete(place / name)
    assert not (place / name / "manifest.json").exists()


def test_the_rank_is_named_and_the_others_end(place):
    done = run(place, "two-logps", "logps:3:1:nan", ENGINES["ddp"])
    assert done.codes == [1, 1] and done.seconds < 60
    assert re.search("error: step 3, rank 1: log-probs are not finite.* in 8 of 8 samples", done.texts[1])
    assert "rank 0: another rank is lost" in done.texts[0]


def test_an_infinite_gradient_under_zero_stops_before_it_is_saved(place):
    done = run(place, "zero-gradient", "gradient:4:1:inf", ENGINES["zero2"])
    assert done.codes == [1, 1]
    assert "step 4, rank 0: the norm of the gradient is" in done.texts[0]
    assert steps_in(place / "zero-gradient") == [2]


def test_the_first_bad_sample_is_named():
    values = torch.zeros(4, 3)
    check_finite("numbers", values, "step 1, rank 0", str)
    values[2, 1], values[3, 0] = -torch.inf, torch.nan
    with pytest.raises(
        RuntimeError, match=r"step 1, rank 0: numbers are not finite \(-inf\) in 2 of 4 samples.* in 2$"
    ):
        check_finite("numbers", values, "step 1, rank 0", str)


def test_a_reward_of_none_is_left_to_trl():
    rewards = [1.0, None, 0]
    assert FiniteReward(lambda prompts, completions, trainer_state: rewards, 0)(["p"] * 3, ["c"] * 3) == rewards
    for bad in (float("inf"), float("-inf"), torch.tensor(float("nan"))):
        with pytest.raises(RuntimeError, match="sample 1 of 2, prompt 'q', completion 'd'"):
            FiniteReward(lambda bad=bad, **_: [0.0, bad], 0)(["p", "q"], ["c", "d"])


# ---- ranks -----------------------------------------------------------------------------------------------------


def test_a_rank_that_is_silent_ends_the_others(place):
    """Stopped, not dead: its connections stay open, so that only its silence tells."""
    processes, logs = start(place, "silent", "rollout:2:1:SIGSTOP", ENGINES["ddp"], env_RANK_WATCH_LIMIT=5)
    try:
        processes[0].join(60)
        assert processes[0].exitcode == 1 and processes[1].is_alive()
    finally:
        for process in processes:
            process.kill()
    with open(logs[0]) as log:
        assert re.search(r"error: rank 0: rank 1 not heard of for \d+ s, so this rank ends as well", log.read())


def test_what_a_lost_rank_looks_like():
    assert is_lost_rank(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert is_lost_rank(torch.distributed.DistBackendError("NCCL"))
    assert not is_lost_rank(RuntimeError("out of memory")) and not is_lost_rank(ValueError("gloo"))


# ---- disks, workers, trackers ----------------------------------------------------------------------------------


def test_a_full_disk_is_named_and_costs_no_checkpoint(place):
    done = run(place, "disk", "disk:5:0:600000")
    assert done.codes == [1]
    message = r"error: rank 0: checkpoint-4 could not be written to disk, where .*; checkpoint-2 is the last complete"
    assert re.search(message, done.text), done.text[-2000:]
    assert sorted(path.name for path in (place / "disk").glob("*point*")) == ["checkpoint-2"]
    assert not (place / "disk/partial").exists()  # its space is given back
    again = run(place, "disk")
    assert again.codes == [0] and "resumes from disk/checkpoint-2" in again.text


def test_a_grader_without_its_workers_gives_the_same_rewards(place):
    """They are killed between two batches; a scheduler's SIGTERM to them changes nothing either."""
    whole = run(place, "graded")
    killed = run(place, "graded-killed", "grading:3:0:SIGKILL")
    assert whole.codes == killed.codes == [0]
    assert gap(course(place / "graded-killed"), course(place / "graded")) == []


def test_a_grading_worker_leaves_sigterm_to_the_trainer():
    pool = WorkerPool(1, 60.0, None)
    job = Comparison("$5$", "$5$")
    assert pool.run([job])[0].reason == "correct"
    (pid,) = pool.pids()
    os.kill(pid, signal.SIGTERM)
    assert pool.run([job])[0].reason == "correct" and pool.pids() == [pid]
    pool.close()


def test_an_unreachable_tracker_costs_the_tracking_only(place):
    """A Trackio space on a hub that cannot be reached."""
    done = run(place, "tracked", report_to="trackio", trackio_space_id="nobody/nowhere")
    assert done.codes == [0], done.text[-2000:]
    assert done.text.count("warning: report_to=trackio failed") == 1 and "the run continues without it" in done.text
    assert len(course(place / "tracked")["metrics"]) == 6


def test_a_tracker_that_fails_later_is_left_alone_from_then_on(capsys):
    class Tracker(TrainerCallback):
        calls = 0

        def on_log(self, args, state, control, **kwargs):
            self.calls += 1
            raise ConnectionError("no route to host")

    args = type("Arguments", (), {"report_to": ["wandb", "trackio"]})()
    tracker = Tracker()
    tolerant = TolerantTracker(tracker, "wandb")
    for _ in range(2):
        tolerant.on_log(args, None, None, logs={})
    assert tracker.calls == 1 and args.report_to == ["trackio"]
    assert "report_to=wandb failed (ConnectionError: no route to host)" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "message"), [("bogus", "allowed are none, "), ("wandb", "requires wandb")])
def test_a_tracker_that_cannot_be_had_is_refused_at_once(tmp_path, name, message):
    if name == "wandb" and shutil.which("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(ValueError, match=f"report_to='{name}': .*{message}"):
        parse_recipe(recipe(tmp_path, report_to=name))


# ---- inputs ----------------------------------------------------------------------------------------------------


def test_a_row_that_cannot_be_read_is_named_by_file_and_line(tmp_path):
    good = b'{"problem": "1+1", "answer": "2"}\n'
    for bad, message in ((b'{"problem": "1+', "not JSON"), (b'{"problem": "\xff"}', "not UTF-8")):
        (tmp_path / "rows.jsonl").write_bytes(good + b"\n" + bad + b"\n" + good)
        with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: {message}"):
            load_problems(str(tmp_path / "rows.jsonl"))


def test_a_recipe_is_plain_yaml(tmp_path):
    marker = tmp_path / "marker"
    path = tmp_path / "recipe.yaml"
    path.write_text(f"method: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: not plain YAML"):
        parse_recipe(["--config", str(path)])
    assert not marker.exists()


def test_a_pickled_adapter_is_refused(tmp_path, place):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save({}, adapter / "adapter_model.bin")
    message = (
        r"needs adapter_model\.safetensors, the only format loaded; holds adapter_config\.json, adapter_model\.bin"
    )
    base = str(place / "outputs/tiny-base")
    with pytest.raises(ValueError, match=message):
        check_model(*parse_recipe(recipe(tmp_path, model_name_or_path=base, adapter=str(adapter))))
    with pytest.raises(ValueError, match=message):
        check_evaluation_model(ModelSource(model_name_or_path=base, adapter=str(adapter)))
    (adapter / "adapter_model.safetensors").touch()
    assert adapter_folder(str(adapter)) == adapter


def test_code_that_comes_with_a_model_runs_only_where_the_recipe_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, marker = tmp_path / "model", tmp_path / "marker"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}')
    (model / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import PretrainedConfig\n\n"
        f"Path({str(marker)!r}).touch()\n\n\nclass OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        check_model(*parse_recipe(recipe(tmp_path, model_name_or_path=str(model))))
    assert not marker.exists()
    with pytest.raises(ValueError, match="holds no weights"):
        check_model(*parse_recipe(recipe(tmp_path, model_name_or_path=str(model), trust_remote_code=True)))
    assert marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"eval_strategy": "steps"},
        {"eval_on_start": True},
        {"load_best_model_at_end": True},
        {"model_init_kwargs": {"a": 1}},
    ],
)
def test_what_a_script_does_not_hand_to_the_trainer_is_refused(tmp_path, change):
    build(seed=0)[0].save_pretrained(tmp_path / "model")
    arguments = parse_recipe(recipe(tmp_path, model_name_or_path=str(tmp_path / "model"), **change))
    ((key, value),) = change.items()
    with pytest.raises(ValueError, match=f"^{key}={value!r}: .*; allowed is"):
        check_model(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": "lomo"}, "^optim='lomo': .*install"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "^optim='sgd' with optim_args='momentum=-1': .*momentum"),
        (
            {"optim_args": "foo=1"},
            "^optim='adamw_torch.*' with optim_args='foo=1': this optimizer makes no use of them",
        ),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "^optim='sgd' with optim_args='momentum=much': .*float"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "^lr_scheduler_type='cosine_with_min_lr' with .*min_lr"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"foo": 1}}, "^lr_scheduler_type='cosine' with .*foo"),
    ],
)
def test_an_optimizer_or_a_schedule_that_cannot_be_made_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        check_optimizer(parse_recipe(recipe(tmp_path, **change))[1])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup", "polynomial"])
def test_a_usual_schedule_passes(tmp_path, schedule):
    check_optimizer(parse_recipe(recipe(tmp_path, lr_scheduler_type=schedule))[1])
