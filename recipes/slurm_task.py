"""`accelerate launch` as the task of one node in a Slurm job; recipes/slurm.sh starts it.

    srun python recipes/slurm_task.py --config_file CONFIG --num_machines 2 --num_processes 16 ... SCRIPT ...

The arguments are those of `accelerate launch`; the node's number is added. SIGTERM ends it with status 143.
"""

from pte_trl.runtime.slurm import main

if __name__ == "__main__":
    main()
