# shellcheck shell=bash
# What all jobs share; the scripts beside this file source it. docs/cluster.md says what to set and what comes of it.
#
#   train RECIPE ...       trains a recipe until its last step, over as many starts as it takes
#   begin PROGRESS ...     the start of a job; `PROGRESS ...` prints a text that changes as the work gets on
#   run_step COMMAND ...   runs it on all tasks of the job, or as the array `step_options` tells srun, and sets `code`
#   finish                 ends the job with `code`, and asks SLURM for another start where that helps

MOST_STARTS=3 # in a row in which the work does not get on

fail() {
  echo "error (job ${SLURM_JOB_ID:-none}): $*" >&2
  exit 2
}

need() { # NAME MEANING: a variable that must be set
  [[ -n ${!1:-} ]] || fail "$1 is not set: $2; set it in $site or in the environment of sbatch"
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "no SLURM job; start this script with sbatch"
site=$NPP_HOME/slurm/site.env
# shellcheck disable=SC1090
[[ ! -r $site ]] || source "$site"
need RUNS_DIR "the folder for run folders, on a file system that all nodes share"

PYTHON=${NPP_PYTHON:-$NPP_HOME/.venv/bin/python}
[[ -x $PYTHON ]] || fail "$PYTHON on $(hostname): no such program; run make install in $NPP_HOME, or set NPP_PYTHON in $site"

export PYTHONPATH=$NPP_HOME${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since SLURM 22.05 srun does not take it from sbatch
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # its warnings come once for each task

notes=$RUNS_DIR/.slurm/$SLURM_JOB_ID
code=0 step_options=()

say() {
  echo "== $(date '+%F %T') job $SLURM_JOB_ID: $*"
}

# The first signal (the time limit is near, another job wants the nodes) goes on to all tasks: they save and end with 75.
# The shell lives on until they have.
asked_by='' heard='' step=''
pass_on() {
  asked_by=$1 heard=yes
  say "got SIG$1"
  [[ -z $step ]] || kill -s "$1" "$step" 2>/dev/null
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

# Counts the starts of this job since the work last got on, also those that ended without a word: SLURM requeues a job
# whose node has died by itself.
begin() {
  progress=("$@")
  mkdir -p "$notes" || fail "$notes: cannot be made; set RUNS_DIR to a folder that you may write to"
  local restart=${SLURM_RESTART_COUNT:-0} last_seen='' count=0
  progress_at_start=$("${progress[@]}")
  if ((restart > 0)) && [[ -r $notes/starts ]]; then
    read -r count last_seen <"$notes/starts"
    [[ $last_seen == "$progress_at_start" ]] || count=0
  fi
  starts=$((count + 1))
  if ! { echo "$starts $progress_at_start" >"$notes/starts.tmp" && mv "$notes/starts.tmp" "$notes/starts"; }; then
    fail "$notes: cannot be written to; make room there"
  fi
  say "$SLURM_JOB_NAME, start $((restart + 1)), on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), $SLURM_NTASKS tasks"
  if ((starts > MOST_STARTS)); then
    code=1
    finish
  fi
}

# `code` becomes 0 when all tasks are done; 75 when they have saved because they were asked to stop; 2, 3 or 4 when a task
# has ended with that; else that of the task which ended first.
run_step() {
  local codes=$notes/codes noted status first
  code=75
  [[ -z $asked_by ]] || return
  if ! { rm -rf "$codes" && mkdir "$codes"; }; then
    fail "$codes: cannot be made anew"
  fi
  srun --kill-on-bad-exit=1 "${step_options[@]}" "$NPP_HOME/slurm/task.sh" "$codes" "$@" &
  step=$!
  heard=yes status=''
  while [[ -n $heard ]]; do # wait returns early when a signal comes
    heard=''
    wait "$step"
    code=$?
    ((code != 127)) || code=${status:-127} # it had returned already
    status=$code
  done
  step=''
  if ((code == 0)); then
    ! compgen -G "$codes/*.75" >/dev/null || code=75
  else
    first=$(find "$codes" -type f ! -name '*.0' -printf '%T@ %f\n' | sort -n | sed -n '1s/.*[.]//p')
    code=${first:-$code}
    for noted in 4 3 2; do
      ! compgen -G "$codes/*.$noted" >/dev/null || code=$noted
    done
  fi
}

finish() {
  local state
  case $code in
    0) say "done" ;;
    2 | 3) say "ended with $code, which another start would not mend: not requeued" ;;
    *)
      state=$(scontrol -o show job "$SLURM_JOB_ID" | grep -oE '\b(JobState|Reason)=\w+' | paste -sd ' ')
      if ((starts >= MOST_STARTS)) && [[ $("${progress[@]}") == "$progress_at_start" ]]; then
        say "ended with $code; started $MOST_STARTS times without getting on: not requeued"
      elif [[ ! $state =~ JobState=RUNNING|Reason=TimeLimit ]]; then
        say "ended with $code; SLURM itself cancels or requeues the job ($state)"
        exit "$code"
      elif scontrol requeue "$SLURM_JOB_ID"; then
        say "ended with $code: requeued"
        exit "$code"
      else
        say "ended with $code, and scontrol could not requeue the job: submit it again to go on"
      fi
      ;;
  esac
  rm -rf "$notes"
  exit "$code"
}

newest_checkpoint() { # RUN
  find "$1/checkpoints" -maxdepth 1 -name 'step-*' ! -name '*.tmp' -printf '%f\n' 2>/dev/null | sort | tail -n 1
}

train() { # RECIPE [key=value ...]
  local recipe=$1 run='' name=$1 argument
  shift
  need DATA_DIR "the folder or URL with the code shards, train and val in it"
  for argument; do
    case $argument in
      name=*) name=${argument#name=} ;;
      run_dir=*) run=${argument#run_dir=} ;;
      --from-step*) fail "--from-step: each start would go back to that step; run npp train --from-step by hand" ;;
    esac
  done
  run=${run:-$RUNS_DIR/$name}
  local overrides=(run_dir="$run" data.train="$DATA_DIR/train" data.val="$DATA_DIR/val")
  [[ -z ${NPP_CACHE_DIR:-} ]] || overrides+=(data.cache_dir="$NPP_CACHE_DIR")
  overrides+=("$@")
  begin newest_checkpoint "$run"
  run_step "$PYTHON" -m npp_ds doctor --recipe "$recipe" "${overrides[@]}"
  ((code == 0)) || finish
  run_step "$PYTHON" -m npp_ds train --recipe "$recipe" "${overrides[@]}"
  finish
}
