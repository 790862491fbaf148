#!/usr/bin/env bash
# Training on one or several nodes under Slurm. From the repository's root:
#
#   sbatch --nodes=2 --gpus-per-node=8 recipes/slurm.sh recipes/qwen7b.yaml
#   sbatch --nodes=1 --gpus-per-node=8 recipes/slurm.sh recipes/qwen3b.yaml --method lora_c --output_dir outputs/lora_c
#
# The recipe comes first, then flags of the training script. The recipe's global_batch (512 in the paper's) is that of
# all nodes together. ACCELERATE_CONFIG names another config than DDP's for one node and ZeRO-2's for several; VENV
# another environment than .venv. The repository and its outputs must lie where every node can read them. Slurm sends
# SIGTERM five minutes before the time is up; --requeue puts a job back that lost a node, and the same command goes on
# from its newest checkpoint.
#SBATCH --job-name=pte_trl
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=pte_trl-%j.log

set -euo pipefail
RECIPE=${1:?usage: sbatch recipes/slurm.sh RECIPE.yaml [--flag value ...]}
shift
NODES=${SLURM_NNODES:?not in a Slurm job: submit this script with sbatch}
GPUS=${SLURM_GPUS_ON_NODE:?no GPUs: sbatch --gpus-per-node=N}
if [ "$NODES" -gt 1 ]; then DEFAULT=multi_node_zero2; else DEFAULT=ddp; fi
CONFIG=${ACCELERATE_CONFIG:-accelerate_configs/$DEFAULT.yaml}
PYTHON=${VENV:-.venv}/bin/python
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))  # two jobs on one node must not meet

echo "$(date -Is) job $SLURM_JOB_ID: $NODES x $GPUS GPUs, $CONFIG, main node $MAIN:$PORT, $RECIPE $*"
# One launcher per node; SLURM_NODEID is known only there. When one ends in error, Slurm ends the others.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    exec "$0" -m accelerate.commands.accelerate_cli launch --config_file "$1" \
        --num_machines "$2" --num_processes "$3" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$4" --main_process_port "$5" recipes/grpo_pte.py --config "${@:6}"
' "$PYTHON" "$CONFIG" "$NODES" "$((NODES * GPUS))" "$MAIN" "$PORT" "$RECIPE" "$@"
