"""Signals, ranks that never meet, and the sentence that every script ends with."""

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from pte_trl.runtime import watch
from pte_trl.runtime.entry import MeetWatch, framed
from pte_trl.runtime.faults import Fault
from pte_trl.runtime.ownership import Owner, own
from pte_trl.runtime.watch import StopOnTerm

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_launchers_copy_of_a_signal_is_the_same_one(tmp_path, number):
    code, text, _ = in_child(tmp_path, train, [(0, number), (0, number), (0.1, number)])
    assert code == 0 and f"asked for {number.value}" in text
    name = number.name
    assert text.count(f"{name}: a checkpoint is saved at the end of this generation batch; a second one ends") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_one_later_ends_the_run_at_once(tmp_path, number, monkeypatch):
    assert 0 < watch.SAME_SIGNAL[signal.SIGINT] < watch.SAME_SIGNAL[signal.SIGTERM] <= 10
    monkeypatch.setitem(watch.SAME_SIGNAL, number, 0.2)
    code, text, _ = in_child(tmp_path, train, [(0, number), (0, number), (0.4, number)])
    assert code == -number and "asked for" not in text and "Traceback" not in text


def test_the_handlers_before_come_back():
    before = [signal.getsignal(number) for number in watch.SAME_SIGNAL]
    train([])
    assert [signal.getsignal(number) for number in watch.SAME_SIGNAL] == before


def meet(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    framed(lambda argv: dist.init_process_group("gloo", timeout=timedelta(minutes=30)))()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_fellow_never_comes_ends(tmp_path, rank, monkeypatch):
    """Of a run by hand: rank 1 connects to nobody, rank 0 waits for the other."""
    monkeypatch.setattr(MeetWatch, "limit", 1.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code, text, seconds = in_child(tmp_path, meet, rank, port)
    assert code == 1 and seconds < 10
    assert re.search(rf"error: rank {rank}: the 2 ranks have not met at 127.0.0.1:{port} in 2 s, so one of them", text)


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
