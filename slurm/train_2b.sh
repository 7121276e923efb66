#!/bin/bash
# Train 2B (1.9B parameters) at 256 px with the paper's recipe. Requeued, it resumes until the last step.
#
#   sbatch slurm/train_2b.sh
#   sbatch --nodes=4 slurm/train_2b.sh schedule.epochs=100
#SBATCH --job-name=train_2b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=128G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@300

NPP_HOME=${NPP_HOME:-$SLURM_SUBMIT_DIR}
source "$NPP_HOME/slurm/common.sh" || {
  echo "error: no slurm/common.sh in $NPP_HOME; submit from the repository's folder, or set NPP_HOME to it" >&2
  exit 2
}
train 2b_256 "$@"
