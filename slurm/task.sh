#!/bin/bash
# Run one task of a step and note the exit code of its command. srun returns one code for all tasks, which may be that
# of a task that srun itself killed.
#
#   task.sh FOLDER COMMAND ...

codes=$1
shift
trap : USR1 TERM # the command handles these signals; this shell waits for it
"$@"
code=$?
noted=yes
: >"$codes/$SLURM_PROCID.$code" || noted=''
if ((code == 75)) && [[ -n $noted ]]; then
  exit 0 # the other tasks are about to end, too, and srun must not kill them
elif ((code)); then
  # srun kills the other tasks when this one ends, perhaps before the first process has printed the common error. Wait
  # two seconds, without a child process that srun would report as killed.
  read -rt 2 <> <(:)
fi
exit "$code"
