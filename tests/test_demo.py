"""The demo at its smallest size: what it shows is what its models answer, and what ends it early is one sentence."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from matplotlib import pyplot as plt
from tqdm import tqdm

from experiments.demo.figure import draw_figure, title
from experiments.demo.measure import ARMS, load, shown_of, unseen_sequences
from experiments.demo.plan import NAMES, WINDOW, Sizes, stages
from experiments.demo.stages import Stage, StageFailed, deferred_signals, duration, progress, run_together
from experiments.study.recall import WORDS
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs
from tests.forked import python

ROOT = Path(__file__).resolve().parent.parent
SIZES = Sizes(base_steps=4, distill_steps=2, grpo_steps=2, grpo_batch=16, sequences=32)
FLAGS = [f"--{name}={value}" for name, value in vars(SIZES).items()]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def demo(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [python(), "-m", "experiments.demo", "--tier", "tiny", *FLAGS, *flags]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder in which the demo has run, with models that had no time to learn, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    ended = demo(folder)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""  # neither bars nor logs where no terminal is
    return folder, ended.stdout


@torch.no_grad()
def replayed(folder: Path) -> dict[str, torch.Tensor]:
    """Every arm's answers by the replay; the demo measures with the cache."""
    tokens, places = unseen_sequences(SIZES.sequences)
    found = {}
    for name, adapter, bounded in ARMS:
        model, mask = load(folder, adapter), torch.ones_like(tokens)
        inputs = replay_inputs(model, mask, 1, Schedule(WINDOW)) if bounded else {"attention_mask": mask}
        found[name] = model(input_ids=tokens, **inputs).logits[:, places - 1].argmax(-1)
    return found


def test_answers_and_accuracies_are_those_of_the_models(done):
    folder, output = done
    tokens, places = unseen_sequences(SIZES.sequences)
    shown = shown_of(tokens, places)
    for name, answers in replayed(folder / "outputs/demo").items():
        (row,) = re.findall(rf"^  {re.escape(name)}  +(.*)$", output, re.MULTILINE)
        *given, accuracy = row.split()
        assert given == [WORDS[token] for token in answers[shown]]
        # Nearly untrained models have near ties: one answer may differ by rounding.
        right = (answers == tokens[:, places]).float().mean().item()
        assert float(accuracy) == pytest.approx(right, abs=1.1 / answers.numel())


def test_the_sequence_is_spelled_out(done):
    _, output = done
    tokens, places = unseen_sequences(SIZES.sequences)
    words = [WORDS[token] for token in tokens[shown_of(tokens, places)]]
    told = ", ".join(f"{word[0]} = {word[1]}" for word in words[1 : NAMES + 1])
    assert f"  told    {told}\n" in output
    row = re.search(r"^  asked +(.*?) +accuracy$", output, re.MULTILINE)[1].split()
    assert row == [f"{words[place - 1]}?" for place in places]
    row = re.search(r"^  right +(.*?) +on all$", output, re.MULTILINE)[1].split()
    assert row == [words[place] for place in places]


def test_the_figure_has_every_arm(done):
    folder, output = done
    picture = folder / re.search(r"figure: (\S+)", output)[1]
    assert picture.read_bytes().startswith(b"\x89PNG") and plt.imread(picture).std() > 0.05
    results = json.loads((folder / "outputs/demo/results.json").read_text())
    figure = draw_figure(results)
    top, bottom = figure.axes
    names = [label.get_text() for label in bottom.get_yticklabels()]
    assert len(bottom.patches) == len(ARMS) == 5
    # Ticks are placed from the top down, so the label of a bar is looked up by its height.
    by_height = dict(zip(bottom.get_yticks(), names, strict=True))
    for bar, arm in zip(bottom.patches, results["arms"], strict=True):
        assert by_height[round(bar.get_y() + bar.get_height() / 2)] == arm["name"]
        assert bar.get_width() == arm["accuracy"]
    boxes = [text.get_text() for text in top.texts]
    words, first = results["example"]["words"], results["example"]["places"][0]
    assert boxes[:NAMES] == [f"{word[0]}={word[1]}" for word in words[1 : NAMES + 1]]
    assert boxes[first - 2] == f"{words[first - 1]}?"
    plt.close(figure)


def test_the_title_has_this_runs_numbers(done):
    folder, _ = done
    results = json.loads((folder / "outputs/demo/results.json").read_text())
    for arm, accuracy in zip(results["arms"], (0.9, 0.2, 0.12, 0.87, 0.5), strict=True):
        arm["accuracy"] = accuracy
    assert "PTE recalls 87%, LoRA 12%" in title(results)


def test_logs_go_to_files_and_a_second_run_keeps_everything(done):
    folder, output = done
    assert "{'" not in output and "outputs/demo/logs" in output
    logs = {path.name: path.stat().st_mtime_ns for path in (folder / "outputs/demo/logs").iterdir()}
    assert set(logs) == {f"{name}.log" for name in ("base", "lora_c", "pte", "pte_grpo", "measure")}
    assert "'kl'" in (folder / "outputs/demo/logs/pte.log").read_text()
    again = demo(folder)
    assert again.returncode == 0 and again.stdout.count(" kept\n") == 5
    assert again.stdout.split("test sequences")[1] == output.split("test sequences")[1]
    assert logs == {path.name: path.stat().st_mtime_ns for path in (folder / "outputs/demo/logs").iterdir()}


def test_other_sizes_are_refused(done):
    folder, _ = done
    ended = demo(folder, "--distill_steps", "3")
    assert ended.returncode == 1
    assert ended.stderr == (
        "error: distill_steps=3 (there: 2): outputs/demo holds a demo of other sizes; take another --output, "
        "or remove it\n"
    )
    ended = demo(folder, "--grpo_steps", "0")
    assert ended.returncode == 2 and "grpo_steps=0: must be at least 1" in ended.stderr


def test_the_command_that_looks_at_the_state_works(done):
    folder, output = done
    (command,) = re.findall(r"^  (\S+ -m pte_trl\.inspect .*)$", output, re.MULTILINE)
    ended = subprocess.run(shlex.split(command), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert list((folder / "outputs/demo/pte/inspect").glob("*.png"))


def test_a_failing_stage_shows_its_sentence(tmp_path):
    base = tmp_path / "outputs/demo/base"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")  # the base looks done, and its training rows are not there
    ended = demo(tmp_path)
    assert ended.returncode == 1
    assert re.match(
        r"error: distil (LoRA_c|PTE) failed \(exit code 1\); the last lines of outputs/demo/", ended.stderr
    )
    assert "\nerror: outputs/demo/train.jsonl: no such file" in ended.stderr and "Traceback" not in ended.stderr


def test_a_signal_while_a_process_is_started_takes_effect_afterwards():
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # A shell that starts the tests in the background has them ignore it.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = []
    try:
        with pytest.raises(SystemExit), deferred_signals():
            signal.raise_signal(signal.SIGTERM)
            started.append(True)
        with pytest.raises(KeyboardInterrupt), deferred_signals():
            signal.raise_signal(signal.SIGINT)
            started.append(True)
        assert len(started) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)


def test_a_stopped_demo_leaves_no_process_and_nothing_half_made(tmp_path):
    command = [sys.executable, "-m", "experiments.demo", *FLAGS, "--base_steps", "100000"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "outputs/demo/logs/base.log").exists():
        time.sleep(0.05)
    while not (children := psutil.Process(process.pid).children()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert not any(child.is_running() for child in children)
    assert not (tmp_path / "outputs/demo/base").exists()


def test_the_others_are_stopped_when_one_fails(tmp_path):
    sleeps = Stage("sleeps", "sleeps", ["-c", "import time; time.sleep(600)"], tmp_path / "never", 1)
    fails = Stage("fails", "fails", ["-c", "import sys; sys.exit('error: seed=x: no number')"], tmp_path / "no", 1)
    began, before = time.perf_counter(), psutil.Process().children()
    with pytest.raises(StageFailed, match=r"fails failed .*\n\nerror: seed=x: no number"):
        run_together([sleeps, fails], tmp_path)
    assert time.perf_counter() - began < 60
    assert psutil.Process().children() == before
    silent = Stage("silent", "silent", ["-c", "pass"], tmp_path / "nothing", 1)
    with pytest.raises(StageFailed, match="exit code 0"):
        run_together([silent], tmp_path)  # it ended well and made nothing


def test_progress_is_read_from_a_stages_own_bar(tmp_path):
    stage = Stage("any", "any", [], tmp_path / "product", 40, "kl")
    with (tmp_path / "log").open("w") as log:
        assert progress(tmp_path / "log", stage) == (0, None)
        for _ in tqdm(range(21), desc="Loading weights", file=log):
            pass
        bar = tqdm(total=40, file=log)
        for step in range(1, 8):
            print({"loss": "0.5", "kl": f"0.{step}", "kl_after_eviction": "0.99"}, file=log)
            bar.update()
            bar.refresh()
        log.flush()
        assert progress(tmp_path / "log", stage) == (7, "0.7")
        bar.close()


def test_stages_of_a_group_do_not_need_each_other(tmp_path):
    products = set()
    for group in stages(SIZES, tmp_path):
        for stage in group:
            used = {str(word) for word in stage.command if str(word).startswith(str(tmp_path))}
            own = str(stage.product.parent)
            folders = {str(tmp_path / name) for name in ("base", "lora_c", "pte", "pte_grpo")}
            assert used & folders - {own} <= products
        products |= {str(stage.product.parent) for stage in group}


def test_durations():
    assert (duration(61.4), duration(9), duration(247)) == ("1 min 01 s", "9 s", "4 min 07 s")
