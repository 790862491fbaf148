"""Errors that end a run, and the exit statuses of signals.

None of these changes a complete checkpoint (`checkpoints.py`), so the same command resumes from it.
"""

import signal

import torch.distributed as dist

TERMINATED = 128 + signal.SIGTERM  # exit status, as a shell gives it
INTERRUPTED = 128 + signal.SIGINT


class Fault(RuntimeError):
    """A run cannot continue; the message says why, where, and what it can be resumed from."""


def is_lost_rank(error: Exception) -> bool:
    """Whether a collective failed because another process has ended; gloo raises a plain RuntimeError."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
