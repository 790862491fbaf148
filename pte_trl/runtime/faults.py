"""What stops a run, said in one sentence: numbers that are not finite, a rank that is gone, a scheduler's warning.

None of these touches a checkpoint that is there already (`checkpoints.py`), so the same command goes on from it.
"""

import signal

import torch.distributed as dist

TERMINATED = 128 + signal.SIGTERM  # exit status, as a shell gives it
INTERRUPTED = 128 + signal.SIGINT


class Fault(RuntimeError):
    """A run cannot go on; the message says why, where, and from what it can be taken up again."""


# ---- numbers that are not finite -------------------------------------------------------------------------------


# ---- SIGTERM and Ctrl-C ----------------------------------------------------------------------------------------


# ---- a rank that is gone ---------------------------------------------------------------------------------------


def is_lost_rank(error: Exception) -> bool:
    """Whether a collective failed because another process is no longer there; gloo raises a plain RuntimeError."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


# ---- trackers --------------------------------------------------------------------------------------------------
