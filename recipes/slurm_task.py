"""`accelerate launch` as the task of a node in a Slurm job; recipes/slurm.sh starts it.

    srun python recipes/slurm_task.py --config_file CONFIG --num_machines 2 --num_processes 16 ... SCRIPT ...

The arguments are those of `accelerate launch`; the node's number is added. At SIGTERM torch's launcher passes it on to
its ranks, waits for them and ends with 1, as after an error. Here it ends with 143, so that the job's script can tell
a run that was stopped from one that failed.
"""

import os
import runpy
import signal
import sys

STOPPED = 128 + signal.SIGTERM


def was_stopped(error: Exception) -> bool:
    """Whether a launcher was ended by SIGTERM, or its ranks ended as they do after one."""
    failures = getattr(error, "failures", {})  # of torch's ChildFailedError: rank -> how it ended
    codes = [failure.exitcode for failure in failures.values()]
    ranks = bool(codes) and all(code in (STOPPED, -signal.SIGTERM) for code in codes)
    return ranks or getattr(error, "sigval", None) == signal.SIGTERM  # of torch's SignalException


def main() -> None:
    sys.argv[1:1] = ["--machine_rank", os.environ["SLURM_NODEID"]]
    try:
        runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)
    except Exception as error:
        if not was_stopped(error):
            raise
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
