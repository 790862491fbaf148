#!/usr/bin/env bash
# A training, an evaluation or the paper's tables as a Slurm job. From the repository's root:
#
#   sbatch --nodes=2 --gpus-per-node=8 recipes/slurm.sh recipes/qwen7b.yaml
#   sbatch --gpus-per-node=8 recipes/slurm.sh recipes/evaluate.py --recipe recipes/qwen3b.yaml --adapter ADAPTER ...
#   sbatch --gpus-per-node=8 recipes/slurm.sh make reproduce-table1 SCALE=paper
#
# A recipe, a script or `make` comes first, then its arguments. At the time limit the job saves, and goes back into the
# queue; docs/slurm.md has the rest. ACCELERATE_CONFIG names another config than DDP's for one node and ZeRO-2's for
# trainings on several, VENV another environment than .venv, REQUEUES another limit than 20.
#SBATCH --job-name=pte_trl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
# Half an hour before the end: more than a step takes, and less than --time.
#SBATCH --signal=TERM@1800
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=pte_trl-%j.log

# For compute nodes without internet, after `hf download MODEL` on a node that has it:
# export HF_HOME=/a/shared/folder HF_HUB_OFFLINE=1
# Where the nodes do not reach each other through the first network interface (`ip -brief address` lists them):
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_DEBUG=INFO

set -euo pipefail
FIRST=${1:?usage: sbatch recipes/slurm.sh RECIPE.yaml or SCRIPT.py or make, then its arguments}
shift
NODES=${SLURM_NNODES:?not in a Slurm job: submit this script with sbatch}
GPUS=${SLURM_GPUS_ON_NODE:?no GPUs: sbatch --gpus-per-node=N}
CPUS=${SLURM_CPUS_PER_TASK:-$GPUS}
REQUEUES=${REQUEUES:-20}
PYTHON=${VENV:-.venv}/bin/python
export SRUN_CPUS_PER_TASK=$CPUS  # since Slurm 22.05 srun does not take --cpus-per-task from sbatch
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CPUS > GPUS ? CPUS / GPUS : 1))}
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-65535}  # s; torch's launcher would kill saving ranks after 30

case $FIRST in
    # Of the shells only bash becomes the run that it starts, so that make's SIGTERM reaches the run.
    make) COMMAND=(make "SHELL=$BASH" "GPUS=$GPUS" "$@") ;;
    *.py) COMMAND=("$FIRST" "$@") ;;
    *) COMMAND=(recipes/grpo_pte.py --config "$FIRST" "$@") ;;
esac
if [ "$FIRST" = make ] && [ "$NODES" -gt 1 ]; then
    echo "error: --nodes=$NODES: make starts its runs on one node; allowed is --nodes=1" >&2
    exit 2
elif [ "$FIRST" != make ] && [ "$((NODES * GPUS))" -eq 1 ] && [ -z "${ACCELERATE_CONFIG:-}" ]; then
    COMMAND=("$PYTHON" "${COMMAND[@]}")
elif [ "$FIRST" != make ]; then
    DEFAULT=ddp
    if [ "$NODES" -gt 1 ] && [ "$FIRST" != recipes/evaluate.py ]; then DEFAULT=multi_node_zero2; fi
    MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # not head, whose SIGPIPE ends the script
    PORT=$((20000 + SLURM_JOB_ID % 20000))  # two jobs on one node must not meet
    COMMAND=("$PYTHON" recipes/slurm_task.py
        --config_file "${ACCELERATE_CONFIG:-accelerate_configs/$DEFAULT.yaml}"
        --num_machines "$NODES" --num_processes "$((NODES * GPUS))"
        --main_process_ip "$MAIN" --main_process_port "$PORT" "${COMMAND[@]}")
fi

RESTARTS=${SLURM_RESTART_COUNT:-0}
echo "$(date -Is) job $SLURM_JOB_ID, start $((RESTARTS + 1)), $NODES x $GPUS GPUs: ${COMMAND[*]}"
# One task per node. When one has ended, for whatever reason, the others have two minutes to end as well.
CODE=0
srun --kill-on-bad-exit=0 --wait=120 "${COMMAND[@]}" || CODE=$?

if [ "$CODE" -eq 143 ] && [ "$RESTARTS" -lt "$REQUEUES" ]; then  # ended by SIGTERM, not by an error
    echo "$(date -Is) job $SLURM_JOB_ID: stopped by SIGTERM, goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
elif [ "$CODE" -eq 143 ]; then
    echo "$(date -Is) job $SLURM_JOB_ID: stopped by SIGTERM after REQUEUES=$REQUEUES; sbatch resumes it by the same line"
fi
exit "$CODE"
