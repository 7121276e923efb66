"""One run per run folder: a lease file names the start that trains here; its heartbeat keeps two from both committing.

Clocks of nodes differ and locks do not reach across every file system, so neither is trusted: an owner is alive when
its counter moves while we watch. Whoever takes the lease writes its file and then removes the temporary files of all
others; an owner writes its temporary file before it looks whose lease it is. So an owner that was suspended anywhere
in between finds either another's name or no temporary file to rename, and never puts its own name back.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from npp_ds.errors import UserError
from npp_ds.utils.files import fsync_directory, locked, parse_json, read_small

logger = logging.getLogger(__name__)

SLOWEST_HEARTBEAT = 20.0
"""Most seconds between two beats that a lease may claim: this code beats every 5."""
LEASE_BYTES = 64 << 10


@dataclass(frozen=True, config=ConfigDict(strict=True))
class Owner:
    """A start of a run. `beat` is counted up as long as its first process lives."""

    token: str
    host: str
    machine: str  # running kernel and process namespace: hosts and containers may share a name
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    process_started: int | None  # in ticks since boot, to recognise a reused pid; None where unknown
    job_id: str | None
    restart_count: int
    started: str
    heartbeat_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    beat: int = 0
    released: bool = False

    def __str__(self) -> str:
        job = f", SLURM job {self.job_id}" if self.job_id else ""
        return f"host {self.host}, pid {self.pid}{job}, since {self.started}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: bytes) -> "Owner | None":
        """Return the owner in `text`; None when it is no lease or an incomplete one."""
        try:
            value = parse_json(text)
            return cls(**{field.name: value[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError):
            return None

    def is_dead_here(self, host: str) -> bool:
        """Return whether it was a process of this machine, named `host`, and has ended."""
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
) -> Owner:
    """Return this process as an owner; None values are taken from the system and SLURM's variables."""
    return Owner(
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
    """Return what identifies machine, boot and container; empty where the system has no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_state(pid: int) -> tuple[str | None, int | None]:
    """Return a process's state (Z and X: it has ended) and start time in ticks since boot; None where unknown."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None, None
    return state, int(rest[18])


class LeaseLostError(UserError):
    """Another start owns the run folder now; this one must commit nothing more."""


class Lease:
    """The right to write into `run_dir`, from `acquire` to `release`, or until another start takes it.

    `token` names this start: temporary files and folders that carry it belong to no other run. The heartbeat sets
    `lost` when it sees another's token; `check` reads the file at once. `host`, `job_id` and `restart_count` are those
    of the system and of SLURM unless given.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        heartbeat_seconds: float = 5.0,
        stale_seconds: float = 60.0,
        host: str | None = None,
        job_id: str | None = None,
        restart_count: int | None = None,
    ):
        self.path = Path(run_dir) / "lease.json"
        self.heartbeat_seconds, self.stale_seconds = heartbeat_seconds, stale_seconds
        self.token = secrets.token_hex(8)
        self.lost = False
        self._us = this_process(self.token, heartbeat_seconds, host, job_id, restart_count)
        self._temporary = self.path.with_name(f".lease.json.{self.token}.tmp")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease; called by the first process of a launch only.

        Watch an owner that may live on another node for up to `stale_seconds`, or six of its heartbeats (of at most
        SLOWEST_HEARTBEAT seconds) where that is more. Raises UserError when it lives.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        pause = min(0.5, self.heartbeat_seconds / 2)
        # `quiet` counts polls, not wall-clock time: time during which this process is suspended must not count as the
        # owner's silence.
        watched, quiet = None, 0.0
        while True:
            owner = self._read()
            if owner is None or watched is None or owner.token != watched.token:
                watched, quiet = owner, 0.0
            lives = owner != watched
            reason = self._reason_to_take(owner, 0.0 if lives else quiet)
            if reason is not None:
                if self._take(owner):
                    break
                continue
            if lives:
                raise UserError(
                    f"{self.path.parent}: another run trains in this folder ({owner}); stop it, or set run_dir to "
                    "another folder"
                )
            assert owner is not None  # a free folder has been taken
            if quiet == 0:
                logger.info(
                    f"{self.path}: held by {owner}; watching for up to {self._patience(owner):g} s whether it lives"
                )
            time.sleep(pause)
            quiet += pause
        if reason:
            logger.info(f"{self.path}: taken over from {owner}: {reason}")
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Read the file now. Raises LeaseLostError, naming the new owner, when another start has the lease."""
        owner = self._read()
        self.lost = self.lost or self._is_of_another(owner)
        if self.lost:
            raise LeaseLostError(
                f"{self.path}: another start has taken over this run folder ({owner or 'unknown'}); this one stops "
                "and leaves the folder to it"
            )

    def release(self) -> None:
        """End the heartbeat and mark the lease as free if it is still ours; a second call does nothing."""
        if self._thread is None or self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(self.heartbeat_seconds)
        if not self._thread.is_alive():  # it hangs in a write: then the lease goes stale
            self._us = replace(self._us, released=True)
            self._beat()

    def _patience(self, owner: Owner) -> float:
        return max(self.stale_seconds, 6 * min(owner.heartbeat_seconds, SLOWEST_HEARTBEAT))

    def _reason_to_take(self, owner: Owner | None, quiet: float) -> str | None:
        """Return why the folder may be taken: an empty text if no message is needed; None if it may not be taken."""
        us = self._us
        if owner is None or owner.released or owner.token == us.token:
            return ""
        if owner.is_dead_here(us.host):
            return "its process has ended"
        if owner.job_id is not None and owner.job_id == us.job_id and owner.restart_count < us.restart_count:
            return "SLURM has requeued its job"
        if quiet >= self._patience(owner):
            return f"it has been silent for {quiet:g} s"
        return None

    def _take(self, expected: Owner | None) -> bool:
        """Replace the lease `expected` by ours; return whether ours is still there a moment later."""
        try:
            self._write_temporary()
            with locked(self.path.with_name("lease.lock"), self.heartbeat_seconds):
                if self._read() != expected:
                    return False
                try:
                    os.replace(self._temporary, self.path)
                except FileNotFoundError:  # another start was faster and has removed it
                    return False
                for other in self.path.parent.glob(".lease.json.*.tmp"):
                    other.unlink(missing_ok=True)
                fsync_directory(self.path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)
        time.sleep(min(0.2, self.heartbeat_seconds / 2))  # for starts on nodes that our lock does not reach
        owner = self._read()
        return owner is not None and owner.token == self.token

    def _keep(self) -> None:
        while not self.lost and not self._stop.wait(self.heartbeat_seconds):
            self._beat()

    def _beat(self) -> None:
        """Rewrite the file unless it is another's; a file system that fails now does not disturb the run."""
        try:
            self._us = replace(self._us, beat=self._us.beat + 1)
            self._write_temporary()
            with locked(self.path.with_name("lease.lock"), self.heartbeat_seconds):
                self.lost = self._is_of_another(self._read())
                if not self.lost:
                    os.replace(self._temporary, self.path)
            self._temporary.unlink(missing_ok=True)
        except OSError:
            pass

    def _is_of_another(self, owner: Owner | None) -> bool:
        return owner is not None and owner.token != self.token

    def _write_temporary(self) -> None:
        with open(self._temporary, "w") as file:
            file.write(self._us.to_json())
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> Owner | None:
        """Return the lease in the file; None when the file is absent or incomplete."""
        for attempt in range(3):
            try:
                return Owner.from_json(read_small(self.path, LEASE_BYTES))
            except FileNotFoundError:
                return None
            except OSError:  # a file that is replaced while it is read may be stale on NFS
                if attempt == 2:
                    raise
                time.sleep(0.2)
        raise AssertionError("three attempts return or raise")
