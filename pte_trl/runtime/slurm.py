"""The task of a node in a Slurm job: `accelerate launch`, whose exit status tells a stopped run from a failed one.

torch's launcher passes SIGTERM on to its ranks, waits for them, and then ends with status 1, as after an error.
"""

import os
import runpy
import sys

from pte_trl.compat.torch import ended_by_sigterm
from pte_trl.runtime.faults import TERMINATED


def main() -> None:
    """Runs `accelerate launch` with this process's arguments, on the node of the step that Slurm started it on.

    Raises:
        SystemExit: 143 where SIGTERM has ended the launcher, or its ranks; a sentence outside of a Slurm job.
    """
    if "SLURM_NODEID" not in os.environ:
        sys.exit("error: SLURM_NODEID is not set: only srun sets it, and recipes/slurm.sh calls srun")
    sys.argv[1:1] = ["--machine_rank", os.environ["SLURM_NODEID"]]
    try:
        runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)
    except Exception as error:
        if not ended_by_sigterm(error):
            raise
        sys.exit(TERMINATED)
