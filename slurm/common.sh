# shellcheck shell=bash
# Functions that all job scripts source. docs/cluster.md describes the settings and the exit codes.
#
#   train RECIPE ...       train a recipe to its last step, over several starts of the job if necessary
#   begin PROGRESS ...     begin a start of the job; `PROGRESS ...` prints a text that changes as the work advances
#   run_step COMMAND ...   run a command on all tasks, with srun's `step_options`, and set `code` to its exit code
#   finish                 end the job with `code`; requeue it if another start can help

MOST_FAILURES=3 # failed starts in a row without progress; a start that was stopped by a signal has not failed
MOST_STARTS=20  # starts in a row without progress, also stopped ones: some jobs are always stopped before a first step
: "${NPP_SLURM_PATIENCE:=600}" # seconds to wait for SLURM's controller to answer a request to requeue

fail() {
  echo "error (job ${SLURM_JOB_ID:-none}): $*" >&2
  exit 2
}

need() { # NAME MEANING: a variable that must be set
  [[ -n ${!1:-} ]] || fail "$1 is not set: $2; set it in $site or in the environment of sbatch"
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "no SLURM job; start this script with sbatch"
# The submitting shell may have these variables from another launch. site.env may set the last two.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
site=$NPP_HOME/slurm/site.env
# shellcheck disable=SC1090
[[ ! -r $site ]] || source "$site"
need RUNS_DIR "the folder for run folders, on a file system that all nodes share"

PYTHON=${NPP_PYTHON:-$NPP_HOME/.venv/bin/python}
[[ -x $PYTHON ]] || fail "$PYTHON on $(hostname): no such program; run make install in $NPP_HOME, or set NPP_PYTHON in $site"

export MASTER_ADDR MASTER_PORT
export PYTHONPATH=$NPP_HOME${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export SLURM_EXPORT_ENV=ALL # pass the variables of this script to the tasks even after sbatch --export=NONE
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since SLURM 22.05 srun does not inherit it from sbatch
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # otherwise each task repeats PyTorch's warnings

# The last task of a job array has the job id of the whole array, so address it by array id and index.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
notes=$RUNS_DIR/.slurm/$SLURM_JOB_ID
code=0 starts=0 step_options=()

say() {
  printf '== %(%F %T)T job %s: %s\n' -1 "$job" "$*"
}

# Forward the first signal (the time limit is near, or another job needs the nodes) to all tasks, which save and exit
# with 75. This shell keeps running until they have ended.
asked_by='' heard='' step=''
pass_on() {
  asked_by=$1 heard=yes
  say "got SIG$1"
  forgive
  [[ -z $step ]] || kill -s "$1" "$step" 2>/dev/null
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

# Count the starts of this job since its last progress. SLURM itself requeues a job after a node failure, so a start
# that ended without a message counts, too.
begin() {
  progress=("$@")
  mkdir -p "$notes" || fail "$notes: cannot be created; set RUNS_DIR to a folder that you may write to"
  # A cancelled job cannot delete its notes, so later jobs delete them.
  find "$RUNS_DIR/.slurm" -mindepth 1 -maxdepth 1 -mtime +90 -exec rm -rf {} + 2>/dev/null
  local restart=${SLURM_RESTART_COUNT:-0} count=0 last_seen=''
  failures_before=0
  progress_at_start=$("${progress[@]}")
  if ((restart > 0)) && [[ -r $notes/starts ]]; then
    read -r count failures_before last_seen <"$notes/starts"
    [[ $last_seen == "$progress_at_start" ]] || count=0 failures_before=0
  fi
  failures=$((failures_before + 1))
  count_starts $((count + 1)) || fail "$notes: cannot be written to; free some space there"
  starts=$((count + 1))
  [[ -z $asked_by ]] || forgive
  say "$SLURM_JOB_NAME, start $((restart + 1)), on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), $SLURM_NTASKS tasks"
  if ((failures > MOST_FAILURES || starts > MOST_STARTS)); then
    code=1
    finish
  fi
  ((SLURM_JOB_NUM_NODES == 1)) || [[ -n ${MASTER_ADDR:-} ]] || find_master
}

# Set MASTER_ADDR, the address for the rendezvous: the first node's name, or its NodeAddr if the name does not resolve.
find_master() {
  local node
  node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_ADDR=$node
  getent hosts "$node" >/dev/null || MASTER_ADDR=$(patiently scontrol -o show node "$node" | grep -oP '\bNodeAddr=\K\S+')
  [[ -n $MASTER_ADDR ]] || fail "node $node: its name does not resolve and scontrol knows no address; set MASTER_ADDR in $site"
}

count_starts() { # STARTS
  echo "$1 $failures $progress_at_start" >"$notes/starts.tmp" && mv "$notes/starts.tmp" "$notes/starts"
}

# Do not count this start as a failure, because it was stopped by a signal.
forgive() {
  ((starts == 0)) || { failures=$failures_before && count_starts "$starts"; }
}

# Set `code`: 0 if all tasks are done; 75 if they saved after a signal; 2, 3 or 4 if any task ended with that code; else
# the code of the task that ended first.
run_step() {
  local codes=$notes/codes noted status first
  code=75
  [[ -z $asked_by ]] || return
  if ! { rm -rf "$codes" && mkdir "$codes"; }; then
    fail "$codes: cannot be deleted and created again"
  fi
  srun --kill-on-bad-exit=1 "${step_options[@]}" "$NPP_HOME/slurm/task.sh" "$codes" "$@" &
  step=$!
  [[ -z $asked_by ]] || kill -s "$asked_by" "$step" # the signal came before the step existed
  heard=yes status=''
  while [[ -n $heard ]]; do # wait returns early when a signal comes
    heard=''
    wait "$step"
    code=$?
    ((code != 127)) || code=${status:-127} # an earlier wait returned the step's code
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
  ((code != 75)) || forgive
  case $code in
    0) say "done" ;;
    2 | 3) say "ended with $code, which another start cannot fix: not requeued" ;;
    *)
      state=$(patiently scontrol -o show job "$job" | grep -oE '\b(JobState|Reason)=\w+' | paste -sd ' ')
      if [[ -n $state && ! $state =~ JobState=RUNNING|Reason=TimeLimit ]]; then
        say "ended with $code; SLURM itself cancels or requeues the job ($state)"
        exit "$code"
      elif ((failures >= MOST_FAILURES || starts >= MOST_STARTS)) && [[ $("${progress[@]}") == "$progress_at_start" ]]; then
        say "ended with $code; started $starts times without progress: not requeued"
      elif trap '' TERM USR1 && patiently scontrol requeue "$job"; then # SLURM may end this shell before scontrol returns
        say "ended with $code: requeued"
        exit "$code"
      else
        say "ended with $code, and scontrol could not requeue the job: submit it again to resume"
      fi
      ;;
  esac
  rm -rf "$notes"
  exit "$code"
}

# Repeat a request to SLURM's controller, which may be unavailable for a while.
patiently() { # COMMAND ...
  local answer end=$((SECONDS + NPP_SLURM_PATIENCE))
  until answer=$("$@" 2>&1); do
    if ((SECONDS >= end)); then
      echo "$answer" >&2
      return 1
    fi
    sleep 3
  done
  echo "$answer"
}

# Progress functions for `begin`; each prints a text that changes as the work advances.
count_files() { # FOLDER PATTERN
  find "$1" -type f -name "$2" 2>/dev/null | wc -l
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
      --from-step*) fail "--from-step: each start would return to that step; run npp train --from-step by hand" ;;
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
