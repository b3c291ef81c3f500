#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Four hosts of eight GPUs, one process on each:   sbatch slurm.sh train.py --steps 1000
#SBATCH --job-name=train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log

set -euo pipefail

# srun starts the processes and tells each its number; batiste.distributed.initialize() reads it.
# When one ends badly, the others are ended. A requeued job goes on from its last checkpoint.
exec srun --kill-on-bad-exit=1 --label python -u "${@:-train.py}"
