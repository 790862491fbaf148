"""SIGTERM, Ctrl-C and the clock save a checkpoint; a rank that is lost ends the others."""

import contextlib
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
from accelerate.utils import broadcast, reduce
from transformers import TrainerCallback

from pte_trl.compat.torch import default_store

GOODBYE = 1 << 40  # more than anyone counts to

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# At Ctrl-C a terminal signals the launcher and all ranks, and the launcher then signals its ranks again: within this
# time, in seconds, it is the same Ctrl-C.
SAME_INTERRUPT = 1.0


class StopOnTerm(TrainerCallback):
    """SIGTERM or Ctrl-C to any rank: all save a checkpoint at the end of the generation batch and leave the training.

    A second Ctrl-C ends the run at once. A second SIGTERM does not, however late: schedulers and launchers send it to
    the same process more than once (Slurm to every process of a step, torch's launcher to its ranks again, Slurm once
    more when the time is up), and each of them sends SIGKILL to a process that it will not wait for any longer.

    Args:
        steps: optimizer steps of a generation batch; a checkpoint inside one would lose what is left of it.
        signals: those that are listened to, SIGTERM and SIGINT if None.

    Attributes:
        stopped: the signal that the training was left for, None if it was not.
    """

    def __init__(self, steps: int, signals: list[int] | None = None):
        self.signals = list(SIGNALS) if signals is None else signals
        self.steps, self.asked, self.stopped = steps, 0, None
        self._since, self._before = 0.0, {}

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in self.signals}

    def _ask(self, number: int, _) -> None:
        if not self.asked:
            self.asked, self._since = number, time.monotonic()
            # os.write, since the signal may have come in the middle of a print
            at_once = "SIGKILL" if number == signal.SIGTERM else "a second one"
            message = f"a checkpoint is saved at the end of this generation batch; {at_once} ends the run now"
            os.write(2, f"{signal.Signals(number).name}: {message}\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self._since > SAME_INTERRUPT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(self, args, state, control, **kwargs):
        asked = torch.tensor([float(self.asked == number) for number in SIGNALS], device=args.device)
        if args.world_size > 1:
            asked = reduce(asked, "sum")
        if asked.any() and state.global_step % self.steps == 0 and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self.stopped = SIGNALS[int(asked.argmax())]

    def on_train_end(self, *_, **kwargs):
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}


class StepsOfThisLaunch(TrainerCallback):
    """Logs, saves and evaluates as often as this launch says: a checkpoint brings the numbers of the earlier one."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)


class SaveByTime(TrainerCallback):
    """Saves a checkpoint at the end of the first generation batch that ends `minutes` after the last checkpoint.

    The clock of the main process decides for all ranks: ranks that disagree would wait for each other.

    Args:
        steps: as of `StopOnTerm`.
    """

    def __init__(self, minutes: float, steps: int):
        self.minutes, self.steps, self._last = minutes, steps, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = time.monotonic()

    on_save = on_train_begin

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps:
            return
        due = torch.tensor([float(time.monotonic() - self._last >= 60 * self.minutes)], device=args.device)
        if args.world_size > 1:
            due = broadcast(due)
        if due.any():
            control.should_save = True


class RankWatch(TrainerCallback):
    """Ends this process when another rank has not been heard of for `limit` seconds.

    A launcher ends the ranks of its own machine when one of them dies, and gloo notices a closed connection. NCCL
    waits `ddp_timeout` for a rank on another machine, half an hour as a rule. So every rank counts up in the store
    through which the ranks have met, from a thread, whatever the main thread is computing.
    """

    limit, interval = 40.0, 4.0  # s

    def __init__(self):
        self._stop, self._thread = threading.Event(), None

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            # A connection of its own: the main thread's may be waiting inside NCCL.
            store = dist.PrefixStore("rank_watch", default_store().clone())
            self._stop.clear()
            watch = (store, args.process_index, args.world_size)
            self._thread = threading.Thread(target=self._watch, args=watch, daemon=True)
            self._thread.start()

    def on_train_end(self, args, state, control, **kwargs):
        self._stop.set()
        if self._thread is not None:  # still at the store while Python shuts down, it would abort the process
            self._thread.join(timeout=self.interval)

    def _watch(self, store: dist.Store, rank: int, ranks: int) -> None:
        counts: dict[int, int] = {}
        heard: dict[int, float] = {}  # a rank counts as heard from its first word on: some take long to begin
        while not self._stop.is_set():
            try:
                store.add(str(rank), 1)
                for other in set(range(ranks)) - {rank}:
                    count = store.add(str(other), 0)
                    if count >= GOODBYE:
                        heard.pop(other, None)
                    elif count != counts.get(other, 0):
                        counts[other], heard[other] = count, time.monotonic()
            except RuntimeError:  # the process that kept the store has ended: nobody is heard from now on
                pass
            silent = {other: time.monotonic() - at for other, at in heard.items()}
            lost = sorted(other for other in silent if silent[other] > self.limit)
            if lost and not self._stop.is_set():
                print(
                    f"error: rank {rank}: rank {', '.join(map(str, lost))} not heard of for {silent[lost[0]]:.0f} s, "
                    "so this rank ends as well; the same command resumes from the last complete checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)  # the main thread may be inside a collective that never returns
            self._stop.wait(self.interval)
        with contextlib.suppress(RuntimeError):
            store.add(str(rank), GOODBYE)  # others may still be busy with the end of the training
