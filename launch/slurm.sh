#!/usr/bin/env bash
# A Slurm allocation: sbatch launch/slurm.sh MODEL --prompts prompts.jsonl --out out.jsonl
# Change the next lines for your cluster, or override them: sbatch --nodes 4 --ntasks-per-node 8 launch/slurm.sh ...
#SBATCH --job-name=coterie
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --distribution=block
#SBATCH --output=coterie-%j.log
# With GPUs, one for each task: #SBATCH --gpus-per-node=4
set -euo pipefail
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# srun starts one process a task; they find each other by the step's first node and a port made from the job's number
# (MASTER_ADDR and MASTER_PORT override both). --kill-on-bad-exit ends the step when one task fails.
exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${PYTHON:-python}" -m coterie generate "$@"
