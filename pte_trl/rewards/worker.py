"""The program of a grading worker: one comparison at a time, each with its own CPU time.

It imports only the standard library at the top, and a worker loads it without the rest of the package
(`worker_pool._PROGRAM`), so that it starts in half a second and never imports the caller's training script, as
`multiprocessing` would.
"""

import logging
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import NamedTuple

START_LIMIT = 120.0  # s of wall time for a worker to import math-verify
SPARE_MEMORY_MB = 16  # for the comparison itself
NO_MATH_VERIFY = 77  # exit code of a worker that cannot import its libraries


class Comparison(NamedTuple):
    """The gold answer, and the content of a box or (not `boxed`) the end of a completion without one."""

    gold: str
    answer: str
    boxed: bool = True


def _peak_memory_mb() -> float:
    """The largest address space this process has had, in MiB; 0 where the system does not tell."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmPeak"))
    except (OSError, StopIteration):  # not Linux
        return 0.0


def serve(connection: str, time_limit: str, memory_limit_mb: str) -> None:
    """Answer jobs until the parent goes away. SIGPROF, when a job has used its CPU time, ends the process.

    The arguments are those of the command line: a file descriptor, seconds, MiB (0: no limit).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # and so is a scheduler's warning, which all processes get
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    pipe, limit, memory = Connection(int(connection)), float(time_limit), int(float(memory_limit_mb))
    signal.setitimer(signal.ITIMER_PROF, START_LIMIT)
    try:
        from pte_trl.rewards.judging import judge, prepare
    except ImportError as error:
        print(f"grading worker: {error}", file=sys.stderr)
        sys.exit(NO_MATH_VERIFY)
    judge("\\frac{1}{2}", "0.5")  # parser tables
    signal.setitimer(signal.ITIMER_PROF, 0)
    if memory:
        import resource

        if memory < _peak_memory_mb() + SPARE_MEMORY_MB:
            return pipe.send(("too small", _peak_memory_mb()))
        resource.setrlimit(resource.RLIMIT_AS, (memory << 20, memory << 20))
    pipe.send(("ready", _peak_memory_mb()))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what goes wrong from now on is a verdict, not a message
    while True:
        try:
            job = Comparison(*pipe.recv())
        except EOFError:
            return
        retire = False
        try:
            signal.setitimer(signal.ITIMER_PROF, limit)
            prepare(job.gold)
            signal.setitimer(signal.ITIMER_PROF, limit)  # the answer's own time
            reason, extracted = judge(*job)
        except Exception:  # MemoryError, RecursionError and whatever escapes math-verify
            reason, extracted, retire = "crashed", None, True
        signal.setitimer(signal.ITIMER_PROF, 0)
        # math-verify swallows a MemoryError, and a bloated worker would fail the next answers too.
        share = _peak_memory_mb() / memory if memory else 0.0
        if share > 0.9 and reason != "correct":
            reason, extracted = "crashed", None
        pipe.send((reason, extracted, retire or share > 0.5))
