#!/bin/bash
# One task of a step: write down the exit code of its command. srun has one code for all tasks, perhaps that of a task
# which it killed itself.
#
#   task.sh FOLDER COMMAND ...

codes=$1
shift
trap : USR1 TERM # the command handles them; this shell waits for it
"$@"
code=$?
noted=yes
: >"$codes/$SLURM_PROCID.$code" || noted=''
if ((code == 75)) && [[ -n $noted ]]; then
  exit 0 # the other tasks are about to end as well: srun must not kill them
elif ((code)); then
  # srun kills the other tasks when this one ends, perhaps before the first process has printed the error of all. Wait
  # for two seconds, with no child process that srun would report as killed.
  read -rt 2 <> <(:)
fi
exit "$code"
