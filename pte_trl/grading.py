"""A pool of killable processes that compare answers with math-verify.

A completion may hold any expression, and some never finish in sympy (`9^{9^{9^9}}`). math-verify's own
time limit is a Python signal: it needs the main thread and cannot interrupt a big-integer power. Here every
comparison runs in a process of ours which the kernel ends when it has used its CPU time.

This file is also the worker's program. It imports only the standard library at the top and is run by its
path, so that a worker starts in half a second and never imports the caller's training script, as
`multiprocessing` would.
"""

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from functools import lru_cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

START_LIMIT = 120.0  # s of wall time for a worker to import math-verify
MAX_FAILED_STARTS = 3  # in a row; one may be bad luck, such as a kill from outside
# CPU time does not pass while other processes hold the cores, so the limit proper is on CPU time and a
# verdict does not depend on the load. The wall-clock limit is this many times longer: it ends a worker that
# is stopped or swaps.
WALL_FACTOR = 4
# verify() rounds decimals to six places and drops what is below 1e-15, so 0.0 "equals" 1.24e-8. Golds smaller
# than SMALL must agree to this relative difference as well.
SMALL, SMALL_TOLERANCE = 1e-3, 1e-3
# A worker gets what this process was started with. What a recipe's `env` has added since could run code in it.
_ENVIRONMENT = dict(os.environ)
# Run by path without this folder, and without the current one (""), whose files could shadow a module.
_PROGRAM = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = filter(None, sys.path)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


class Job(NamedTuple):
    """A comparison: the gold answer, LaTeX in `$...$`, and the text in which math-verify finds the other."""

    gold: str
    answer: str


class Reply(NamedTuple):
    """`reason`: correct, wrong, unparsable, bad gold, timeout or crashed; `extracted`: the text compared."""

    reason: str
    extracted: str | None = None
    retire: bool = False  # the worker asks to be replaced


class _Worker:
    """The parent's end of one process: idle (`job` None), busy, or not yet `ready`."""

    def __init__(self, time_limit: float, memory_limit_mb: int | None):
        self.connection, theirs = Pipe()
        arguments = [__file__, str(theirs.fileno()), str(time_limit), str(memory_limit_mb or 0)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=_ENVIRONMENT | {"PYTHONHASHSEED": "0"},  # sympy's order of terms: the same verdict in every run
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


class WorkerPool:
    """`size` processes that each do one job at a time; started by the first `run`, kept until `close`.

    `time_limit` is in seconds of CPU time for one answer (and as much again for a gold that the worker sees
    for the first time), `memory_limit_mb` the address space of a worker in MiB (None: no limit).
    """

    def __init__(self, size: int, time_limit: float, memory_limit_mb: int | None):
        if size < 1 or time_limit <= 0:
            raise ValueError(f"a pool needs workers >= 1 and time_limit > 0, got {size} and {time_limit}")
        self.size, self.time_limit, self.memory_limit_mb = size, time_limit, memory_limit_mb
        self._workers: list[_Worker] = []
        self._owner: int | None = None
        self._failed_starts = 0
        self._tried: set[int] = set()  # jobs of this run whose worker has died once
        self._lock = threading.Lock()  # one run at a time, whichever thread it comes from

    def pids(self) -> list[int]:
        """Process ids of the living workers."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End all workers. The next `run` starts new ones."""
        with self._lock:
            _kill_all(self._workers, self._owner or 0)

    def run(self, jobs: list[Job]) -> list[Reply]:
        """Do all jobs and return their replies in the same order.

        Raises RuntimeError if a worker cannot be started.
        """
        with self._lock:
            if self._owner != os.getpid():  # first use in this process, or in a fork of it
                self._workers, self._owner = [], os.getpid()
                weakref.finalize(self, _kill_all, self._workers, self._owner)
            try:
                return self._run(jobs)
            except BaseException:
                # A late reply must not be taken for the answer to the next call's job.
                _kill_all(self._workers, self._owner)
                raise

    def _run(self, jobs: list[Job]) -> list[Reply]:
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

    def _assign(self, worker: _Worker, waiting: deque[int], jobs: list[Job]) -> None:
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
        else:
            self._failed_starts = 0
        worker.ready, worker.job, worker.deadline = True, None, math.inf

    def _lose(self, worker: _Worker, waiting: deque[int], replies: dict[int, Reply], overdue: bool = False) -> None:
        """Take a dead or overdue worker out of the pool; its job is tried once more before it is called crashed.

        Most workers that die are killed from outside, for want of memory, and the job is not to blame.
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
            raise RuntimeError(
                f"grading workers do not start (last exit code {code}); the error message is on stderr. "
                "Is math-verify installed for this Python, and the memory limit large enough?"
            )
        if worker.job is None:
            return
        if overdue or code == -signal.SIGPROF:
            replies[worker.job] = Reply("timeout")
        elif worker.job in self._tried:
            replies[worker.job] = Reply("crashed")
        else:
            self._tried.add(worker.job)
            waiting.append(worker.job)


# From here on: the worker's program.


def _peak_memory_mb() -> float:
    """The largest address space this process has had, in MiB; 0 where the system does not tell."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmPeak"))
    except (OSError, StopIteration):  # not Linux
        return 0.0


def _parse(text: str) -> list:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # No search for \boxed: the caller has taken the content out, and math-verify would join neighbouring
    # boxes into a set. (Its expression for boxes also takes 20 s for 2,000 characters of "\(\boxed{x}".)
    configs = [LatexExtractionConfig(boxed_match_priority=-1), ExprExtractionConfig()]
    return parse(text, configs, parsing_timeout=None)


_parse_gold = lru_cache(maxsize=4096)(_parse)


def _agrees_if_small(gold: list, answer: list) -> bool:
    """Whether a number below verify's rounding is right to a relative difference; True for anything else."""
    gold, answer = (getattr(parsed[0], "rhs", parsed[0]) for parsed in (gold, answer))
    if not (getattr(gold, "is_number", False) and getattr(answer, "is_number", False)):
        return True
    try:
        gold, answer = complex(gold), complex(answer)
    except (TypeError, ValueError, OverflowError):
        return True
    return not 0 < abs(gold) < SMALL or abs(answer - gold) <= SMALL_TOLERANCE * abs(gold)


def _compare(job: Job, time_limit: float) -> Reply:
    from math_verify import verify

    signal.setitimer(signal.ITIMER_PROF, time_limit)
    gold = _parse_gold(job.gold)
    if not gold:
        return Reply("bad gold")
    signal.setitimer(signal.ITIMER_PROF, time_limit)  # the answer's own time
    answer = _parse(job.answer)
    # parse() returns the sympy expression, if any, and then the text that it came from
    extracted = next((part for part in answer if isinstance(part, str)), None)
    if answer and verify(gold, answer, timeout_seconds=None) and _agrees_if_small(gold, answer):
        return Reply("correct", extracted)
    parsed = any(not isinstance(part, str) for part in answer)
    return Reply("wrong" if parsed else "unparsable", extracted)


def _serve(connection: Connection, time_limit: float, memory_limit_mb: int) -> None:
    """Answer jobs until the parent goes away. SIGPROF, when a job has used its CPU time, ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # and so is a scheduler's warning, which all processes get
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    _compare(Job("$\\frac{1}{2}$", "$0.5$"), START_LIMIT)  # imports, parser tables
    signal.setitimer(signal.ITIMER_PROF, 0)
    if memory_limit_mb:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_limit_mb << 20, memory_limit_mb << 20))
    connection.send("ready")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what goes wrong from now on is a verdict, not a message
    while True:
        try:
            job = Job(*connection.recv())
        except EOFError:
            return
        try:
            reply = _compare(job, time_limit)
        except Exception:  # MemoryError, RecursionError and whatever escapes math-verify
            reply = Reply("crashed", retire=True)
        signal.setitimer(signal.ITIMER_PROF, 0)
        # math-verify swallows a MemoryError, and a bloated worker would fail the next answers too.
        share = _peak_memory_mb() / memory_limit_mb if memory_limit_mb else 0.0
        if share > 0.9 and reply.reason != "correct":
            reply = Reply("crashed")
        # A plain tuple: the parent knows this class under another module's name.
        connection.send((reply.reason, reply.extracted, reply.retire or share > 0.5))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[2])), float(sys.argv[3]), int(sys.argv[4]))
