#!/bin/bash
# Sample from a run on all tasks of the job and compare the samples with real images. Resumes after an interruption.
#
#   sbatch slurm/evaluate.sh xxl_256 --cfg-scale 1.65
#   sbatch --nodes=4 slurm/evaluate.sh /runs/xxl_256 --cfg-scale 1.65
#SBATCH --job-name=evaluate
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

[[ -n ${1:-} ]] || fail "which run? sbatch slurm/evaluate.sh RUN [options of npp sample]"
need REFERENCE "the reference that the samples are compared with"
run=$1
shift
[[ -d $run ]] || run=$RUNS_DIR/$run
count=(--per-class 50)
for option; do
  [[ $option != --count* ]] || count=()
  [[ $option != --out* ]] || fail "$option: not supported; the folder is named after the options, so that the same command resumes"
done
# Each checkpoint with its options has its own folder, so the same command resumes the sampling of an earlier job.
samples="$(newest_checkpoint "$run")${*:+ $*}"
samples=$run/samples/${samples//[^[:alnum:]._=-]/_}

begin count_files "$samples" '*'
run_step "$PYTHON" -m npp_ds doctor
((code == 0)) || finish
against=(--reference "$REFERENCE" ${INCEPTION_WEIGHTS:+--inception-weights "$INCEPTION_WEIGHTS"})
one_task=(--nodes=1 --ntasks=1 --ntasks-per-node=1)
step_options=("${one_task[@]}")
run_step "$PYTHON" -m npp_ds evaluate "$run" "${against[@]}" --check
((code == 0)) || finish
step_options=()
run_step "$PYTHON" -m npp_ds sample "$run" "${count[@]}" --out "$samples" "$@"
((code == 0)) || finish
say "sampled into $samples"
step_options=("${one_task[@]}")
run_step "$PYTHON" -m npp_ds evaluate "$run" --samples "$samples" "${against[@]}"
finish
