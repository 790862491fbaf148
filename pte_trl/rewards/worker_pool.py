"""A pool of killable processes that compare answers (`judging.py`).

A completion may hold any expression, and some never finish in sympy (`9^{9^{9^9}}`). math-verify's own
time limit is a Python signal: it needs the main thread and cannot interrupt a big-integer power. Here every
comparison runs in a process (`worker.py`) which the kernel ends when it has used its CPU time.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from pte_trl.rewards.worker import NO_MATH_VERIFY, SPARE_MEMORY_MB, START_LIMIT, Comparison

MAX_FAILED_STARTS = 3  # in a row; one may be bad luck, such as a kill from outside
# CPU time does not pass while other processes hold the cores, so the limit proper is on CPU time and a
# verdict does not depend on the load. The wall-clock limit is this many times longer: it ends a worker that
# is stopped or swaps.
WALL_FACTOR = 4
MIN_MEMORY_MB = 64  # no Python process is smaller; what a worker really needs, it tells when it has started
# The packages that decide a verdict, with the names under which their versions are in records.
DECIDING = ("math-verify", "sympy", "latex2sympy2_extended", "antlr4-python3-runtime")
# A worker gets what this process was started with. What a recipe's `env` has added since could run code in it.
_ENVIRONMENT = dict(os.environ)
# The package without its __init__, which would import torch. The current folder (""), whose files could shadow a
# module, is no place to import from; those of PYTHONPATH are, but last, and without running their sitecustomize.
_PROGRAM = """
import json, signal, sys, types
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = [*filter(None, sys.path), *json.loads(sys.argv[2])]
package = sys.modules["pte_trl"] = types.ModuleType("pte_trl")
package.__path__ = [sys.argv[1]]
from pte_trl.rewards.worker import serve
serve(*sys.argv[3:])
"""


def verdict_versions() -> dict[str, str]:
    """Versions of the packages that decide verdicts, by their names with underscores, for records and manifests."""
    found = {}
    for package in DECIDING:
        try:
            found[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            found[package.replace("-", "_")] = "not installed"
    return found


def check_limits(workers: int, time_limit: float, memory_limit_mb: int | None = None, prefix: str = "") -> None:
    """Refuses limits under which nothing could be graded.

    Args:
        prefix: of the keys' names in the message, such as "grader_".

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"{prefix}workers={workers!r}: must be an integer of at least 1 (processes that grade)")
    number = isinstance(time_limit, (int, float)) and not isinstance(time_limit, bool)
    if not number or not math.isfinite(time_limit) or time_limit <= 0:
        raise ValueError(f"{prefix}time_limit={time_limit!r}: must be a finite number of seconds above 0")
    if memory_limit_mb is None:
        return
    number = isinstance(memory_limit_mb, (int, float)) and not isinstance(memory_limit_mb, bool)
    if not number or not math.isfinite(memory_limit_mb) or memory_limit_mb < MIN_MEMORY_MB:
        raise ValueError(
            f"{prefix}memory_limit_mb={memory_limit_mb!r}: must be None or a number of MiB of at least {MIN_MEMORY_MB}"
        )


class Reply(NamedTuple):
    """`reason`: correct, wrong, unparsable, bad gold, timeout or crashed; `extracted`: the text compared."""

    reason: str
    extracted: str | None = None
    retire: bool = False  # the worker asks to be replaced


class _Worker:
    """The parent's end of one process: idle (`job` None), busy, or not yet `ready`."""

    def __init__(self, time_limit: float, memory_limit_mb: int | None):
        self.connection, theirs = Pipe()
        theirs_from = json.dumps([path for path in _ENVIRONMENT.get("PYTHONPATH", "").split(os.pathsep) if path])
        arguments = [str(Path(__file__).parents[1]), theirs_from, str(theirs.fileno()), str(time_limit)]
        # sympy's order of terms follows the hash seed: the same verdict in every run
        kept = {key: value for key, value in _ENVIRONMENT.items() if not key.startswith("PYTHON")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *arguments, str(memory_limit_mb or 0)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=kept | {"PYTHONHASHSEED": "0"},
        )
        theirs.close()
        self.ready = False
        self.job: int | None = None  # index of the job in this run
        self.deadline = time.monotonic() + START_LIMIT

    def kill(self) -> int:
        """End the process and return its exit code (negative: the signal that ended it)."""
        self.process.kill()
        self.connection.close()
        return self.process.wait()


def _kill_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:  # a forked copy of the parent does not own them
        while workers:
            workers.pop().kill()


_pools: "weakref.WeakSet[WorkerPool]" = weakref.WeakSet()


def _forget_after_fork() -> None:
    """In a forked child: a lock that another thread held would never be released, and the workers are not its own."""
    for pool in _pools:
        pool.forget()


os.register_at_fork(after_in_child=_forget_after_fork)


class WorkerPool:
    """`size` processes that each do one job at a time; started by the first `run`, kept until `close`.

    `time_limit` is in seconds of CPU time for one answer (and as much again for a gold that the worker sees
    for the first time), `memory_limit_mb` the address space of a worker in MiB (None: no limit).
    """

    def __init__(self, size: int, time_limit: float, memory_limit_mb: int | None):
        check_limits(size, time_limit, memory_limit_mb)
        self.size, self.time_limit, self.memory_limit_mb = size, time_limit, memory_limit_mb
        self._workers: list[_Worker] = []
        self._owner: int | None = None
        self._failed_starts = 0
        self._tried: set[int] = set()  # jobs of this run whose worker has died once
        self._lock = threading.Lock()  # one run at a time, whichever thread it comes from
        _pools.add(self)

    def forget(self) -> None:
        """Start anew in a forked child; the parent's workers stay the parent's."""
        for worker in self._workers:
            worker.connection.close()  # this process's copy: else a worker would outlive the parent
        self._workers, self._owner, self._lock = [], None, threading.Lock()

    def pids(self) -> list[int]:
        """Process ids of the living workers."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End all workers. The next `run` starts new ones."""
        with self._lock:
            _kill_all(self._workers, self._owner or 0)

    def run(self, jobs: list[Comparison]) -> list[Reply]:
        """Do all jobs and return their replies in the same order.

        Raises RuntimeError if a worker cannot be started, ValueError if its memory limit is below what it needs.
        """
        with self._lock:
            if self._owner is None:  # first use in this process, which may be a fork
                self._workers, self._owner = [], os.getpid()
                weakref.finalize(self, _kill_all, self._workers, self._owner)
            try:
                return self._run(jobs)
            except BaseException:
                # A late reply must not be taken for the answer to the next call's job.
                _kill_all(self._workers, self._owner)
                raise

    def _run(self, jobs: list[Comparison]) -> list[Reply]:
        waiting, replies = deque(range(len(jobs))), {}
        self._tried = set()
        while len(replies) < len(jobs):
            while len(self._workers) < min(self.size, len(jobs) - len(replies)):
                self._workers.append(_Worker(self.time_limit, self.memory_limit_mb))
            for worker in self._workers:
                if worker.ready and worker.job is None and waiting:
                    self._assign(worker, waiting, jobs)
            nearest = min(worker.deadline for worker in self._workers)
            timeout = None if nearest == math.inf else max(0.0, nearest - time.monotonic())
            heard = wait([worker.connection for worker in self._workers], timeout)
            for worker in list(self._workers):
                if worker.connection in heard:
                    self._receive(worker, waiting, replies)
                elif worker.deadline <= time.monotonic():
                    self._lose(worker, waiting, replies, overdue=True)
        return [replies[index] for index in range(len(jobs))]

    def _assign(self, worker: _Worker, waiting: deque[int], jobs: list[Comparison]) -> None:
        try:
            worker.connection.send(tuple(jobs[waiting[0]]))
        except OSError:  # it died while idle; `wait` reports it at once and the job goes to another
            return
        worker.job = waiting.popleft()
        worker.deadline = time.monotonic() + WALL_FACTOR * self.time_limit

    def _receive(self, worker: _Worker, waiting: deque[int], replies: dict[int, Reply]) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            return self._lose(worker, waiting, replies)
        if worker.ready:
            replies[worker.job] = Reply(*message)
            if replies[worker.job].retire:
                self._workers.remove(worker)
                worker.kill()
        elif message[0] == "too small":
            raise ValueError(
                f"memory_limit_mb={self.memory_limit_mb!r}: a grading worker needs {message[1]:.0f} MiB to start; "
                f"allowed is None or at least {message[1] + SPARE_MEMORY_MB:.0f}"
            )
        else:
            self._failed_starts = 0
        worker.ready, worker.job, worker.deadline = True, None, math.inf

    def _lose(self, worker: _Worker, waiting: deque[int], replies: dict[int, Reply], overdue: bool = False) -> None:
        """Take a dead or overdue worker out of the pool; its job is tried once more before it is given up.

        Most workers that die are killed from outside, for want of memory, and most that are overdue without having
        used their CPU time are stopped or swapped out; the job is not to blame.
        """
        self._workers.remove(worker)
        try:
            code = worker.process.wait(timeout=0 if overdue else 1)  # its own exit code, before we kill it
        except subprocess.TimeoutExpired:
            code = None
        worker.kill()
        self._failed_starts += not worker.ready
        if self._failed_starts >= MAX_FAILED_STARTS:
            self._failed_starts = 0
            raise RuntimeError(_why_not_started(code))
        if worker.job is None:
            return
        if code == -signal.SIGPROF:
            replies[worker.job] = Reply("timeout")
        elif worker.job in self._tried:
            replies[worker.job] = Reply("timeout" if overdue else "crashed")
        else:
            self._tried.add(worker.job)
            waiting.append(worker.job)


def _why_not_started(code: int | None) -> str:
    if code == NO_MATH_VERIFY:
        return (
            f"grading workers do not start: {sys.executable} cannot import math-verify or a library of it; the "
            "error message is on stderr, and pip install math-verify installs it"
        )
    if code is None:
        return f"grading workers do not start: {MAX_FAILED_STARTS} in a row took more than {START_LIMIT:.0f} s"
    if code < 0:
        return (
            f"grading workers do not start: {MAX_FAILED_STARTS} in a row were killed from outside while they started "
            f"(last by signal {-code}), as a system does that runs out of memory"
        )
    return f"grading workers do not start (last exit code {code}); the error message is on stderr"
