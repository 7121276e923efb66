"""Who holds a run folder: the contents of lease.json, and whether the process that it names still lives here."""

import json
import os
import socket
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True)
class Holder:
    """A start of a run. `beat` is counted up as long as its first process lives."""

    token: str
    host: str
    machine: str  # running kernel and process namespace: hosts and containers may share a name
    pid: int
    process_started: int | None  # in ticks since boot, to recognise a reused pid; None where nobody tells
    job_id: str | None
    restart_count: int
    started: str
    heartbeat_seconds: float
    beat: int = 0
    released: bool = False

    def __str__(self) -> str:
        job = f", SLURM job {self.job_id}" if self.job_id else ""
        return f"host {self.host}, pid {self.pid}{job}, since {self.started}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: bytes) -> "Holder | None":
        """None when `text` is no lease, or the half of one."""
        try:
            value = json.loads(text)
            return cls(**{field.name: value[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError):
            return None

    def is_dead_here(self, host: str) -> bool:
        """Whether it was a process of this machine, which goes by the name `host`, and has ended."""
        if (self.host, self.machine) != (host, _machine()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        state, started = _process_state(self.pid)
        return state in ("Z", "X") or (started is not None and started != self.process_started)


def this_process(
    token: str, heartbeat_seconds: float, host: str | None, job_id: str | None, restart_count: int | None
) -> Holder:
    """This process as a holder; what is None is asked of the system and of SLURM's variables."""
    return Holder(
        token=token,
        host=host or socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        process_started=_process_state(os.getpid())[1],
        job_id=job_id or os.environ.get("SLURM_JOB_ID"),
        restart_count=int(os.environ.get("SLURM_RESTART_COUNT") or 0) if restart_count is None else restart_count,
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        heartbeat_seconds=heartbeat_seconds,
    )


def _machine() -> str:
    """Tells apart machines, boots and containers; empty where the system has no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_state(pid: int) -> tuple[str | None, int | None]:
    """State of a process (Z and X: it has ended) and its start time in ticks since boot; None where nobody tells."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None, None
    return state, int(rest[18])
