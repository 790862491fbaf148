"""The frame around every script: an error ends it with one sentence, and what it owned is released."""

import functools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager

import torch.distributed as dist

from pte_trl.runtime.faults import INTERRUPTED, Fault, is_lost_rank
from pte_trl.runtime.ownership import release_all

REPORT = (
    "This error was not foreseen. Please report it with the traceback above, the command, the recipe, "
    "and what `pip freeze` prints."
)


@contextmanager
def settings_checked():
    """Around all that a script checks before weights load: a setting that is refused ends it in one line.

    Raises:
        SystemExit: with the sentence of the ValueError or OSError.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def run(main: Callable[[], object]) -> None:
    """Runs a script's `main`; an unexpected error ends with a line on where to report it."""
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.exit(REPORT)


def framed(main: Callable) -> Callable:
    """Decorates `main(argv)`: an interrupt, a `Fault` or a lost rank ends it with a sentence and no traceback."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None):
        watch = MeetWatch()
        rank = os.environ.get("RANK", "0")
        try:
            return main(argv)
        except KeyboardInterrupt:
            print("interrupted; the same command resumes from what is on the disk", file=sys.stderr, flush=True)
            sys.exit(INTERRUPTED)
        except Fault as fault:
            sys.exit(f"error: {fault}")
        except RuntimeError as error:
            if not is_lost_rank(error):
                raise
            sys.exit(
                f"error: rank {rank}: another rank is lost, so this one ends as well; the same command resumes from "
                f"what is on the disk ({error})"
            )
        finally:
            watch.end()
            release_all()

    return run


class MeetWatch:
    """Ends this process when the ranks of a run have not met `limit` seconds after it was ready to.

    A rank that dies before that leaves no connection that could break, and the others would wait for `ddp_timeout`,
    half an hour as a rule. Only time in which this process does nothing counts: on a slow disk it may still be
    importing. Where nodes start far apart PTE_MEET_LIMIT is set to more seconds.
    """

    limit, interval, idle = 40.0, 0.5, 0.02  # s; the last is CPU time within an interval

    def __init__(self):
        self._met = threading.Event()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
            self.limit = float(os.environ.get("PTE_MEET_LIMIT", self.limit))
            threading.Thread(target=self._watch, daemon=True).start()

    def end(self) -> None:
        self._met.set()

    def _watch(self) -> None:
        waited, used = 0.0, time.process_time()
        while waited < self.limit:
            if self._met.wait(self.interval) or dist.is_initialized():
                return
            before, used = used, time.process_time()
            waited += self.interval if used - before < self.idle else 0.0
        print(
            f"error: rank {os.environ.get('RANK', '0')}: the {os.environ['WORLD_SIZE']} ranks have not met at "
            f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')} in {self.limit:.0f} s, so one "
            "of them is lost or cannot be reached; PTE_MEET_LIMIT=600 waits ten minutes where nodes start that slowly",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the main thread is inside a connect that lasts ddp_timeout
