"""An output has one owner at a time; one that has ended, however it ended, is no owner."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from pte_trl.runtime.ownership import Owner, here, is_running, own, release_all

FORK = multiprocessing.get_context("fork")  # the imports are paid already


@pytest.fixture(autouse=True)
def none_left():
    yield
    release_all()


def holder(path, file: bool, ready) -> None:
    own(path, file)
    ready.send(True)
    time.sleep(60)


@contextmanager
def hold(path, file: bool = False):
    """Another process that owns the path."""
    mine, theirs = FORK.Pipe()
    other = FORK.Process(target=holder, args=(path, file, theirs))
    other.start()
    try:
        assert mine.recv()
        yield other
    finally:
        other.kill()
        other.join()


def test_a_second_run_ends_at_once_and_a_killed_ones_place_is_free(tmp_path):
    with hold(tmp_path) as other:
        began = time.monotonic()
        with pytest.raises(ValueError) as refusal:
            own(tmp_path)
        assert time.monotonic() - began < 2
        assert str(refusal.value) == (
            f"{tmp_path}: process {other.pid} on {socket.gethostname()} is writing there; wait for it or end it, or "
            f"take another output. If it is sure that nothing runs there: rm {tmp_path}/.owner"
        )
    assert (tmp_path / ".owner").exists()  # as SIGKILL leaves it
    own(tmp_path)
    release_all()
    assert not list(tmp_path.iterdir())


def test_a_file_has_an_owner_too(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    with hold(path, file=True) as other:
        with pytest.raises(ValueError, match=rf"rows.jsonl: process {other.pid} on"):
            own(path, file=True)
        own(path.parent)  # the folder is another thing


def test_one_process_does_not_own_twice(tmp_path):
    own(tmp_path)
    with pytest.raises(ValueError, match="this process is writing there"):
        own(tmp_path)
    release_all()
    own(tmp_path)


def leave(folder, **changes) -> None:
    """The mark of an owner that holds no lock, as on a file system where locks do not reach other machines."""
    folder.mkdir(exist_ok=True)
    (folder / ".owner").write_text(json.dumps(here() | changes))


def test_without_a_lock_the_process_tells(tmp_path):
    with hold(tmp_path / "elsewhere") as other:
        started = json.loads((tmp_path / "elsewhere/.owner").read_text())["started"]
        leave(tmp_path / "a", pid=other.pid, started=started)
        with pytest.raises(ValueError, match=f"process {other.pid} on"):
            Owner(tmp_path / "a")
        leave(tmp_path / "b", pid=other.pid, started=started - 100)  # the number was given again
        Owner(tmp_path / "b").release()
    assert not is_running(other.pid, started)
    Owner(tmp_path / "a").release()


def test_an_owner_on_another_machine_is_known_by_its_heartbeat(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Owner, "silence", 1.0)
    leave(tmp_path, host="far", machine="another", pid=1)
    mark = tmp_path / ".owner"
    beat = [sys.executable, "-c", f"import os, time\nfor _ in range(100): os.utime({str(mark)!r}); time.sleep(0.1)"]
    with subprocess.Popen(beat) as other:
        with pytest.raises(ValueError, match="process 1 on far is writing there"):
            Owner(tmp_path)
        other.kill()
    Owner(tmp_path).release()
    assert "was last written to by process 1 on far" in capsys.readouterr().out


def test_an_owner_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(Owner, "beat", 0.05)
    owner = Owner(tmp_path)
    os.utime(owner.mark, (0, 0))
    time.sleep(0.5)
    assert owner.mark.stat().st_mtime > 0
    owner.release()


@pytest.mark.parametrize("content", ["", "{", "[1]", "5", '{"host": 1}'])
def test_a_mark_that_cannot_be_read_is_nobodys(tmp_path, content):
    (tmp_path / ".owner").write_text(content)
    Owner(tmp_path).release()


def test_a_forked_copy_owns_nothing(tmp_path):
    owner = Owner(tmp_path)
    if os.fork() == 0:
        owner.release()
        os._exit(0)
    os.wait()
    assert owner.mark.exists()
    owner.release()


PLACES = {
    "a file": (lambda folder: (folder / "x").touch() or folder / "x", "x is a file where a folder is needed|exists"),
    "below a file": (lambda folder: (folder / "x").touch() or folder / "x/y", "is a file where a folder is needed"),
    "read-only": (lambda folder: "/proc/output", "/proc/output: cannot be written to"),
    "empty": (lambda folder: "", "output_dir='': not given"),
}


@pytest.mark.parametrize("name", PLACES)
def test_places_that_cannot_be_written(tmp_path, name):
    make, message = PLACES[name]
    with pytest.raises(ValueError, match=message):
        own(make(tmp_path))
