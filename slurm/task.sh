#!/bin/bash
# One task of a step: notes how its command has ended. srun tells one code for all tasks, that of those it kills if need be.
#
#   task.sh FOLDER COMMAND ...

codes=$1
shift
trap : USR1 TERM # they are the command's; this shell waits for it
"$@"
code=$?
noted=yes
: >"$codes/$SLURM_PROCID.$code" || noted=''
if ((code == 75)) && [[ -n $noted ]]; then
  exit 0 # the others are about to end as well: srun is to leave them alone
elif ((code)); then
  # srun ends the others when this task ends: the one that speaks for all may not have spoken yet. A sleep that is
  # itself ended would be told of; this waits for two seconds too.
  read -rt 2 <> <(:)
fi
exit "$code"
