"""The pool of grading processes: what is killed, replaced, shared between threads, and ended with the program."""

import inspect
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import version

import pytest

from pte_trl.rewards import worker_pool as grading
from pte_trl.rewards.grader import (
    Grader,
    Verdict,
)
from pte_trl.rewards.worker_pool import verdict_versions

TOWER = r"\boxed{9^{9^{9^9}}}"


def grade(grader: Grader, gold: str, completion: str) -> Verdict:
    return grader.grade([gold], [completion])[0]


def busy_pid(grader: Grader, other_than: int | None = None) -> int:
    """Wait until a worker has the first job, and return its process id."""
    for _ in range(1000):
        time.sleep(0.05)
        for worker in grader._pool._workers:
            if worker.job == 0 and worker.process.pid != other_than:
                return worker.process.pid
    raise AssertionError("no worker became busy")


def runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def wait_until_ended(pids: list[int]) -> None:
    for _ in range(200):
        if not any(runs(pid) for pid in pids):
            return
        time.sleep(0.05)
    raise AssertionError(f"one of the processes {pids} does not end")


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")


def test_a_worker_killed_at_work_is_replaced():
    with Grader(workers=1, time_limit=60.0) as grader:
        verdicts = []
        work = lambda: verdicts.extend(grader.grade(["5", "6"], [TOWER, r"\boxed{6}"]))  # noqa: E731
        thread = threading.Thread(target=work)
        thread.start()
        killed = busy_pid(grader)
        os.kill(killed, signal.SIGKILL)
        again = busy_pid(grader, other_than=killed)  # the job may not be to blame: it is tried once more
        os.kill(again, signal.SIGKILL)
        thread.join(30)
        assert [verdict.reason for verdict in verdicts] == ["crashed", "correct"]
        assert killed != again and not {killed, again} & set(grader._pool.pids())


@needs_proc
def test_a_worker_killed_while_idle_is_replaced():
    with Grader(workers=2) as grader:
        golds, completions = ["1", "2", "3"], [r"\boxed{1}", r"\boxed{2}", r"\boxed{4}"]
        for _ in range(2):
            reasons = [verdict.reason for verdict in grader.grade(golds, completions)]
            assert reasons == ["correct", "correct", "wrong"]
            pids = grader._pool.pids()
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            wait_until_ended(pids)


def test_the_answer_of_a_stopped_worker_is_tried_again():
    with Grader(workers=1, time_limit=0.5) as grader:
        assert grade(grader, "5", r"\boxed{5}").correct
        stopped = grader._pool.pids()
        os.kill(stopped[0], signal.SIGSTOP)
        start = time.monotonic()
        assert grade(grader, "5", r"\boxed{5}").correct
        assert 1.9 < time.monotonic() - start < 20
        assert grader._pool.pids() != stopped


def test_an_answer_whose_workers_get_no_cpu_meets_the_wall_clock_limit_twice(monkeypatch):
    with Grader(workers=1, time_limit=0.25) as grader:
        assign = grader._pool._assign

        def assign_and_stop(worker, waiting, jobs):
            assign(worker, waiting, jobs)
            os.kill(worker.process.pid, signal.SIGSTOP)

        monkeypatch.setattr(grader._pool, "_assign", assign_and_stop)
        assert grade(grader, "5", r"\boxed{9^{9^{9}}}").reason == "timeout"
        monkeypatch.undo()
        assert grade(grader, "5", r"\boxed{5}").correct


@needs_proc
def test_a_worker_that_outgrows_its_memory_is_replaced():
    with Grader(workers=1, memory_limit_mb=None) as grader:
        assert grade(grader, "5", r"\boxed{5}").correct
        with open(f"/proc/{grader._pool.pids()[0]}/status") as status:
            peak_mb = int(re.search(r"VmPeak:\s*(\d+)", status.read())[1]) // 1024
    with Grader(workers=1, time_limit=60.0, memory_limit_mb=peak_mb + 30) as grader:
        # math-verify multiplies it out, since nobody knows the value of f(x)
        assert grade(grader, "f(x)", r"\boxed{(x+y+z+w)^{100}}").reason == "crashed"
        assert grader._pool.pids() == []
        assert grade(grader, "5", r"\boxed{5}").correct


def test_from_several_threads_at_once(grader):
    """math-verify's own time limit fails outside the main thread; and replies must reach their own caller."""
    results = {}

    def work(number):
        results[number] = grader.grade([str(number)] * 5, [rf"\boxed{{{number + i}}}" for i in range(5)])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number in range(4):
        assert [verdict.correct for verdict in results[number]] == [True] + [False] * 4


def test_interrupted_run_leaves_no_late_reply(grader, monkeypatch):
    def interrupt(*args):
        monkeypatch.undo()
        raise KeyboardInterrupt

    assert grade(grader, "5", r"\boxed{5}").correct
    monkeypatch.setattr(grader._pool, "_receive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        grade(grader, "7", r"\boxed{7}")
    assert grade(grader, "7", r"\boxed{8}").reason == "wrong"


# The package's own import is left out: it brings torch, which takes long.
SCRIPT = r"""
import os, signal, sys, threading, time, types
package = sys.modules["pte_trl"] = types.ModuleType("pte_trl")
package.__path__ = [sys.argv[2]]
from pte_trl.rewards.grader import Grader
print("main is run", flush=True)  # no `if __name__ == "__main__"`: a worker must not import this
grader = Grader(time_limit=600.0)
assert grader.grade(["1", "2"], [r"\boxed{1}", r"\boxed{2}"])[1].correct
if os.fork() == 0:  # a fork has workers of its own, and its end leaves its parent's alone
    pids = grader._pool.pids()
    assert grader.grade(["1"], [r"\boxed{1}"])[0].correct and grader._pool.pids()[0] not in pids
    sys.exit()
assert os.wait()[1] == 0
pids = grader._pool.pids()
assert grader.grade(["1"], [r"\boxed{1}"])[0].correct and grader._pool.pids() == pids
print(*pids, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
# It exits while a worker is at work.
threading.Thread(target=grader.grade, args=(["5"], [r"\boxed{9^{9^{9^9}}}"]), daemon=True).start()
while all(worker.job is None for worker in grader._pool._workers):
    time.sleep(0.1)
"""


@needs_proc
@pytest.mark.parametrize("end", ["exits", "killed"])
def test_workers_end_with_the_program(tmp_path, end):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    package = os.path.dirname(os.path.dirname(inspect.getfile(Grader)))
    command = [sys.executable, script, end, package]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == (-signal.SIGKILL if end == "killed" else 0)
    assert done.stdout.count("main is run") == 1
    pids = [int(pid) for pid in done.stdout.split("\n")[-2].split()]
    assert len(pids) == 2
    wait_until_ended(pids)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit(3)", r"do not start \(last exit code 3\); the error message is on stderr"),
        (
            "import os; os.kill(os.getpid(), 9)",
            r"3 in a row were killed from outside while they started \(last by signal",
        ),
        ("import sys; sys.modules['sympy'] = None\n{}", "cannot import math-verify or a library of it"),
    ],
)
def test_a_worker_that_cannot_start_says_why(monkeypatch, program, message):
    monkeypatch.setattr("pte_trl.rewards.worker_pool._PROGRAM", program.replace("{}", grading._PROGRAM))
    with Grader(workers=1) as grader, pytest.raises(RuntimeError, match=message):
        grade(grader, "5", r"\boxed{5}")


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "2", None, math.nan])
def test_a_number_of_workers_is_checked_at_once(workers):
    with pytest.raises(ValueError, match=r"^workers=.*: must be an integer of at least 1"):
        Grader(workers=workers)


@pytest.mark.parametrize("time_limit", [0, -1.0, math.nan, math.inf, -math.inf, "5", None, True])
def test_a_time_limit_is_checked_at_once(time_limit):
    with pytest.raises(ValueError, match=r"^time_limit=.*: must be a finite number of seconds above 0"):
        Grader(time_limit=time_limit)


@pytest.mark.parametrize("memory", [0, -5, 63, math.nan, math.inf, "2048", True])
def test_a_memory_limit_is_checked_at_once(memory):
    with pytest.raises(ValueError, match=r"^memory_limit_mb=.*: must be None or a number of MiB of at least 64"):
        Grader(memory_limit_mb=memory)


@needs_proc
def test_a_memory_limit_below_a_workers_own_need_says_how_much_that_is():
    need = r"memory_limit_mb=64: a grading worker needs \d+ MiB to start; allowed is None or at least \d+"
    with Grader(workers=1, memory_limit_mb=64) as grader, pytest.raises(ValueError, match=need):
        grade(grader, "5", r"\boxed{5}")


def test_a_fork_while_another_thread_grades_has_a_grader_of_its_own():
    with Grader(workers=1, time_limit=60.0) as grader:
        thread = threading.Thread(target=grader.grade, args=(["5"], [TOWER]), daemon=True)
        thread.start()
        parents = busy_pid(grader)
        child = os.fork()  # the thread holds the pool's lock, and nobody in the child would release it
        if child == 0:
            verdict = grade(grader, "5", r"\boxed{5}")
            fine = verdict.correct and grader._pool.pids() != [parents]
            grader.close()
            os._exit(0 if fine else 1)
        for _ in range(600):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.1)
        else:
            os.kill(child, signal.SIGKILL)
            pytest.fail("the fork waits for a lock for ever")
        assert status == 0 and runs(parents)
        os.kill(parents, signal.SIGKILL)
        os.kill(busy_pid(grader, other_than=parents), signal.SIGKILL)
        thread.join(30)


def test_a_folder_of_pythonpath_runs_nothing_in_a_worker_and_shadows_nothing(tmp_path, monkeypatch):
    for name in ("sitecustomize", "sympy", "usercustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Grader(workers=1) as grader:
        assert grade(grader, "5", r"\boxed{5}").correct
    assert not (tmp_path / "ran").exists()


def test_versions_that_decide_verdicts():
    versions = verdict_versions()
    assert list(versions) == ["math_verify", "sympy", "latex2sympy2_extended", "antlr4_python3_runtime"]
    assert versions["sympy"] == version("sympy") and "not installed" not in versions.values()
