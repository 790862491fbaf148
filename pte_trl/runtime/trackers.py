"""Experiment trackers: refused before the weights load where they cannot work, and unable to end a run."""

import sys
from collections.abc import Callable

from transformers import TrainerCallback

from pte_trl.compat.transformers import tracker_callbacks
from pte_trl.settings.extras import check_extra


class TolerantTracker:
    """A tracker's callback whose failure costs the tracking and not the run; the first failure is printed."""

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
                    "the run continues without it",
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
    known = tracker_callbacks()
    for name in names:
        if name == "trackio":
            check_extra("trackio", "report_to='trackio'")
        try:
            if name != "none":
                known[name]()
        except KeyError:
            raise ValueError(f"report_to={name!r}: allowed are none, {', '.join(known)}") from None
        except Exception as error:
            raise ValueError(f"report_to={name!r}: {error}") from error


def tolerate_trackers(trainer) -> None:
    """An unreachable tracker must not end a run."""
    names = {callback: name for name, callback in tracker_callbacks().items()}
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [TolerantTracker(each, names[type(each)]) if type(each) in names else each for each in callbacks]
