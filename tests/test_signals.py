"""Signals, ranks that never meet, and the sentence that every script ends with."""

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainerControl

from pte_trl.runtime import watch
from pte_trl.runtime.entry import MeetWatch, framed
from pte_trl.runtime.faults import Fault
from pte_trl.runtime.ownership import Owner, own
from pte_trl.runtime.watch import SaveByTime, StopOnTerm

FORK = multiprocessing.get_context("fork")


def in_child(tmp_path, target, *args, limit: float = 30) -> tuple[int, str, float]:
    """Exit status, output and seconds of a function in a forked process."""
    log = tmp_path / "log"

    def child():
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        target(*args)

    began = time.monotonic()
    process = FORK.Process(target=child)
    process.start()
    process.join(limit)
    alive = process.is_alive()
    process.kill()
    assert not alive, log.read_text()
    return process.exitcode, log.read_text(), time.monotonic() - began


def train(signals: list[tuple[float, int]]) -> None:
    """Sends signals to itself after so many seconds, while a training listens; prints what was asked for."""
    stop = StopOnTerm(1)
    stop.on_train_begin(None, None, None)
    for wait, number in signals:
        time.sleep(wait)
        os.kill(os.getpid(), number)
    print("asked for", stop.asked)
    stop.on_train_end(None, None, None)


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, "SIGKILL"), (signal.SIGINT, "a second one")])
def test_the_launchers_copy_of_a_signal_is_the_same_one(tmp_path, number, ends):
    code, text, _ = in_child(tmp_path, train, [(0, number), (0, number), (0.1, number)])
    assert code == 0 and f"asked for {number.value}" in text
    message = f"{number.name}: a checkpoint is saved at the end of this generation batch; {ends} ends the run now"
    assert text.count(message) == 1


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_comes_as_often_and_as_late_as_it_likes(tmp_path, first, monkeypatch):
    monkeypatch.setattr(watch, "SAME_INTERRUPT", 0.05)
    code, text, _ = in_child(tmp_path, train, [(0, first), *[(0.2, signal.SIGTERM)] * 3])
    assert code == 0 and f"asked for {first.value}" in text and text.count("a checkpoint is saved") == 1


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_later_ends_the_run_at_once(tmp_path, first, monkeypatch):
    assert 0 < watch.SAME_INTERRUPT <= 2
    monkeypatch.setattr(watch, "SAME_INTERRUPT", 0.2)
    code, text, _ = in_child(tmp_path, train, [(0, first), (0, first), (0.4, signal.SIGINT)])
    assert code == -signal.SIGINT and "asked for" not in text and "Traceback" not in text


def test_the_handlers_before_come_back():
    before = [signal.getsignal(number) for number in watch.SIGNALS]
    train([])
    assert [signal.getsignal(number) for number in watch.SIGNALS] == before


# ---- saving by the clock -----------------------------------------------------------------------------------------


def test_a_checkpoint_is_due_so_long_after_the_last_one_and_between_generation_batches(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    args, save = SimpleNamespace(world_size=1, device="cpu"), SaveByTime(minutes=2, steps=2)
    save.on_train_begin(args, None, None)

    def saves_at(seconds: float, step: int) -> bool:
        clock[0], control = 1000.0 + seconds, TrainerControl()
        save.on_step_end(args, SimpleNamespace(global_step=step), control)
        if control.should_save:
            save.on_save(args, None, None)
        return control.should_save

    assert [saves_at(seconds, step) for seconds, step in [(119, 2), (121, 3), (125, 4), (244, 6), (245, 8)]] == [
        *(False, False, True, False, True)
    ]
    clock[0] = 1300.0
    save.on_save(args, None, None)  # one of save_steps
    assert not saves_at(370, 10) and saves_at(420, 12)


def clocks_differ(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    PartialState._reset_state()  # this process was forked from one that may have been alone
    PartialState(cpu=True)
    args, state, save = SimpleNamespace(world_size=2, device="cpu"), SimpleNamespace(global_step=1), SaveByTime(1, 1)
    for late in (0, 1):  # the rank whose minute is over
        save._last = time.monotonic() - 61 * (rank == late)
        control = TrainerControl()
        save.on_step_end(args, state, control)
        print(f"rank {late} is late: {control.should_save}.")
    dist.destroy_process_group()


def test_the_main_process_decides_for_ranks_whose_clocks_differ(tmp_path, free_port):
    (tmp_path / "other").mkdir()
    other = FORK.Process(target=in_child, args=(tmp_path / "other", clocks_differ, 1, free_port))
    other.start()
    code, text, _ = in_child(tmp_path, clocks_differ, 0, free_port)
    other.join(30)
    texts = (text, (tmp_path / "other/log").read_text())
    assert code == 0 and all("rank 0 is late: True.\nrank 1 is late: False." in said for said in texts), texts


# ---- ranks that never meet, and endings --------------------------------------------------------------------------


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def meet(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    framed(lambda argv: dist.init_process_group("gloo", timeout=timedelta(minutes=30)))()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_fellow_never_comes_ends(tmp_path, rank, monkeypatch, free_port):
    """Of a run by hand: rank 1 connects to nobody, rank 0 waits for the other."""
    monkeypatch.setattr(MeetWatch, "limit", 1.5)
    code, text, seconds = in_child(tmp_path, meet, rank, free_port)
    assert code == 1 and seconds < 10
    assert re.search(
        rf"error: rank {rank}: the 2 ranks have not met at 127.0.0.1:{free_port} in 2 s, so one of them", text
    )


def test_ranks_that_met_are_left_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(MeetWatch, "limit", 0.1)
    watch = MeetWatch()
    watch.end()
    time.sleep(0.3)  # this process is still here


ENDS = {
    "Ctrl-C": (KeyboardInterrupt(), 130),
    "a fault": (Fault("why"), "error: why"),
    "a lost rank": (RuntimeError("[gloo] closed"), r"error: rank 0: another rank is lost, .* \(\[gloo\] closed\)"),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_a_script_is_a_sentence_and_frees_its_folder(tmp_path, name, capsys):
    error, ending = ENDS[name]

    @framed
    def main(argv=None):
        own(tmp_path)
        raise error

    with pytest.raises(SystemExit) as ended:
        main()
    if isinstance(ending, int):
        assert ended.value.code == ending and capsys.readouterr().err.count("\n") == 1
    else:
        assert re.fullmatch(ending, ended.value.code)
    Owner(tmp_path).release()


def test_what_nobody_foresaw_keeps_its_traceback(tmp_path):
    @framed
    def main(argv=None):
        own(tmp_path)
        torch.ones(2) @ torch.ones(3)

    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main()
    Owner(tmp_path).release()
