#!/bin/bash
# Encode the images of train, then val, to code shards on all tasks of the job. Resumes after an interruption.
#
#   sbatch slurm/tokenize.sh
#   SPLITS=train sbatch --nodes=2 slurm/tokenize.sh --crop-range 1.1 1.05
#SBATCH --job-name=tokenize
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=128G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:TERM@60

NPP_HOME=${NPP_HOME:-$SLURM_SUBMIT_DIR}
source "$NPP_HOME/slurm/common.sh" || {
  echo "error: no slurm/common.sh in $NPP_HOME; submit from the repository's folder, or set NPP_HOME to it" >&2
  exit 2
}

need DATA_DIR "the folder for the code shards"
need IMAGES "the images: a folder, or the original tar"
need TOKENIZER "a tokenizer's checkpoint, such as vq_ds16_c2i.pt"

begin count_files "$DATA_DIR" '*.tar'
run_step "$PYTHON" -m npp_ds doctor
((code == 0)) || finish
for split in ${SPLITS:-train val}; do
  crops=center
  [[ $split != train ]] || crops=ten
  run_step "$PYTHON" "$NPP_HOME/data_prep/tokenize_imagenet.py" --images "$IMAGES" --split "$split" \
    --out "$DATA_DIR/$split" --tokenizer "$TOKENIZER" --crops "$crops" "$@"
  ((code == 0)) || break
done
finish
