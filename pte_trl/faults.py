"""What stops a run, said in one sentence: numbers that are not finite, a rank that is gone, a scheduler's warning.

None of these touches a checkpoint that is there already (`checkpoints.py`), so the same command goes on from it.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from accelerate.utils import reduce
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from pte_trl.rewards import completion_text

GOODBYE = 1 << 40  # more than anyone counts to
TERMINATED = 128 + signal.SIGTERM  # exit status, as a shell gives it
INTERRUPTED = 128 + signal.SIGINT


class Fault(RuntimeError):
    """A run cannot go on; the message says why, where, and from what it can be taken up again."""


# ---- numbers that are not finite -------------------------------------------------------------------------------


def check_finite(what: str, values: Tensor, place: str, name: Callable[[int], str]) -> None:
    """Stops at the first sample with a NaN or an infinity among its (samples, ...) values.

    Args:
        place: step and rank.
        name: of the sample with an index, for a human being.
    """
    bad = ~torch.isfinite(values.detach()).flatten(1).all(dim=1)
    if bad.any():
        index = int(bad.nonzero()[0])
        first = values[index][~torch.isfinite(values[index])][0].item()
        raise Fault(
            f"{place}: {what} are not finite ({first}) in {int(bad.sum())} of {len(bad)} samples, "
            f"first in {name(index)}"
        )


class FiniteReward:
    """A reward function that stops the run at NaN or infinity; None, by which TRL leaves a sample out, passes."""

    def __init__(self, function: Callable, rank: int):
        self.function, self.rank = function, rank
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, prompts: list, completions: list, trainer_state=None, **kwargs) -> list:
        rewards = self.function(prompts=prompts, completions=completions, trainer_state=trainer_state, **kwargs)
        for index, reward in enumerate(rewards):
            if reward is not None and not abs(float(reward)) < float("inf"):
                step = trainer_state.global_step + 1 if trainer_state else "?"
                raise Fault(
                    f"step {step}, rank {self.rank}: {self.__name__} gave {reward} for sample {index} of "
                    f"{len(rewards)}, prompt {tail(completion_text(prompts[index]))}, "
                    f"completion {tail(completion_text(completions[index]))}"
                )
        return rewards


def tail(text: str, length: int = 80) -> str:
    """The end of a text, where a prompt differs from others."""
    return repr(text if len(text) <= length else "…" + text[-length:])


def samples_without_gradient(loss_of: Callable[[int], Tensor], count: int, parameters: Sequence[Tensor]) -> list[int]:
    """The samples, of `count`, whose own loss has a gradient that is not finite."""
    bad = []
    for index in range(count):
        grads = torch.autograd.grad(loss_of(index), parameters, allow_unused=True)
        if not all(torch.isfinite(grad).all() for grad in grads if grad is not None):
            bad.append(index)
    return bad


# ---- SIGTERM and Ctrl-C ----------------------------------------------------------------------------------------

# A scheduler signals the launcher and all ranks, and the launcher then signals its ranks again; so does a terminal at
# Ctrl-C. Within this time, in seconds, it is the same signal; later it is a second one, which ends the run at once.
SAME_SIGNAL = {signal.SIGTERM: 5.0, signal.SIGINT: 1.0}


class StopOnTerm(TrainerCallback):
    """SIGTERM or Ctrl-C to any rank: all save a checkpoint at the end of the generation batch and leave the training.

    Args:
        steps: optimizer steps of a generation batch; a checkpoint inside one would lose what is left of it.

    Attributes:
        stopped: the signal that the training was left for, None if it was not.
    """

    def __init__(self, steps: int):
        self.steps, self.asked, self.stopped = steps, 0, None
        self._since, self._before = 0.0, {}

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SAME_SIGNAL}

    def _ask(self, number: int, _) -> None:
        if not self.asked:
            self.asked, self._since = number, time.monotonic()
            # os.write, since the signal may have come in the middle of a print
            name = signal.Signals(number).name
            message = (
                f"{name}: a checkpoint is saved at the end of this generation batch; a second one ends the run now"
            )
            os.write(2, f"{message}\n".encode())
        elif time.monotonic() - self._since > SAME_SIGNAL[number]:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(self, args, state, control, **kwargs):
        asked = torch.tensor([float(self.asked == number) for number in SAME_SIGNAL], device=args.device)
        if args.world_size > 1:
            asked = reduce(asked, "sum")
        if asked.any() and state.global_step % self.steps == 0 and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self.stopped = [*SAME_SIGNAL][int(asked.argmax())]

    def on_train_end(self, *_, **kwargs):
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}


# ---- a rank that is gone ---------------------------------------------------------------------------------------


def is_lost_rank(error: Exception) -> bool:
    """Whether a collective failed because another process is no longer there; gloo raises a plain RuntimeError."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class RankWatch(TrainerCallback):
    """Ends this process when another rank has not been heard of for `limit` seconds.

    A launcher ends the ranks of its own machine when one of them dies, and gloo notices a closed connection. NCCL
    waits `ddp_timeout` for a rank on another machine, half an hour as a rule. So every rank counts aloud in the store
    through which the ranks have met, from a thread, whatever the main thread is computing.
    """

    limit, interval = 40.0, 4.0  # s

    def __init__(self):
        self._stop, self._thread = threading.Event(), None

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            # A connection of its own: the main thread's may be waiting inside NCCL.
            store = dist.PrefixStore("rank_watch", dist.distributed_c10d._get_default_store().clone())
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
            except RuntimeError:  # the store has gone with the process that kept it: everyone is silent from now on
                pass
            silent = {other: time.monotonic() - at for other, at in heard.items()}
            lost = sorted(other for other in silent if silent[other] > self.limit)
            if lost and not self._stop.is_set():
                print(
                    f"error: rank {rank}: rank {', '.join(map(str, lost))} not heard of for {silent[lost[0]]:.0f} s, "
                    "so this rank ends as well; the same command goes on from the last complete checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)  # the main thread may be inside a collective that never returns
            self._stop.wait(self.interval)
        with contextlib.suppress(RuntimeError):
            store.add(str(rank), GOODBYE)  # others may still be busy with the end of the training


# ---- trackers --------------------------------------------------------------------------------------------------


class Tolerant:
    """A tracker's callback whose failure costs the tracking and not the run; the first one is said aloud."""

    def __init__(self, callback: TrainerCallback, name: str):
        self.callback, self.name, self.failed = callback, name, False

    def __getattr__(self, event: str):
        method = getattr(self.callback, event)
        return self._tolerate(method, event) if callable(method) and event.startswith("on_") else method

    def _tolerate(self, method: Callable, event: str) -> Callable:
        def call(args, *rest, **kwargs):
            if self.failed:
                return None
            try:
                return method(args, *rest, **kwargs)
            except Exception as error:
                self.failed = True
                args.report_to = [name for name in args.report_to if name != self.name]  # TRL logs completions itself
                print(
                    f"warning: report_to={self.name} failed ({type(error).__name__}: {error}); "
                    "the run goes on without it",
                    file=sys.stderr,
                    flush=True,
                )
                return None

        return call


def check_trackers(names: list[str]) -> None:
    """Refuses a tracker that is not known or not installed, which transformers would find out after the weights.

    Raises:
        ValueError: naming it and what is allowed.
    """
    for name in names:
        try:
            if name != "none":
                INTEGRATION_TO_CALLBACK[name]()
        except KeyError:
            raise ValueError(f"report_to={name!r}: allowed are none, {', '.join(INTEGRATION_TO_CALLBACK)}") from None
        except Exception as error:
            raise ValueError(f"report_to={name!r}: {error}") from error


def tolerate_trackers(trainer) -> None:
    """An unreachable tracker must not end a run."""
    names = {callback: name for name, callback in INTEGRATION_TO_CALLBACK.items()}
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [Tolerant(each, names[type(each)]) if type(each) in names else each for each in callbacks]
