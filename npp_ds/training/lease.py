"""One run folder, one run: a file that says who trains here, kept alive by a heartbeat, so that two never both commit.

Clocks of nodes differ and locks do not reach across every file system, so neither is trusted: a holder is alive when
its counter moves while we watch. Whoever takes the lease writes its file and then removes the temporary files of all
others; a holder writes its temporary file before it looks whose lease it is. So a holder that was suspended anywhere
in between finds either another's name or no temporary file to rename, and never puts its own name back.
"""

import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from npp_ds.errors import UserError
from npp_ds.training.lease_owner import Holder, this_process
from npp_ds.utils.files import fsync_directory
from npp_ds.utils.locks import locked


class LeaseLostError(UserError):
    """Another start holds the run folder now; this one must commit nothing more."""


class Lease:
    """The right to write into `run_dir`, from `acquire` to `release`, or until another start takes it.

    `token` names this start: temporary files and folders that carry it are shared with no other run.
    `lost` is set by the heartbeat when it has seen another's token; `check` looks at once. `host`, `job_id` and
    `restart_count` are the system's and SLURM's unless given.
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

    def acquire(self, say: Callable[[str], Any] = print) -> None:
        """Takes the lease; called by the first process of a launch only.

        Watches a holder that may live on another node for up to `stale_seconds`, or six of its heartbeats where that
        is more. Raises UserError when it lives.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        pause = min(0.5, self.heartbeat_seconds / 2)
        watched, quiet = None, 0.0  # `quiet` counts looks, not the clock: while we are suspended nobody is silent
        while True:
            holder = self._read()
            if holder is None or watched is None or holder.token != watched.token:
                watched, quiet = holder, 0.0
            lives = holder is not None and holder.beat != watched.beat
            reason = self._reason_to_take(holder, 0.0 if lives else quiet)
            if reason is not None:
                if self._take(holder):
                    break
                continue
            if lives:
                raise UserError(
                    f"{self.path.parent}: another run trains in this folder ({holder}); stop it, or set run_dir to "
                    "another folder"
                )
            if quiet == 0:
                say(f"{self.path}: held by {holder}; watching for up to {self._patience(holder):g} s whether it lives")
            time.sleep(pause)
            quiet += pause
        if reason:
            say(f"{self.path}: taken over from {holder}: {reason}")
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Reads the file now. Raises LeaseLostError, naming the new holder, when the lease is another's."""
        holder = self._read()
        self.lost = self.lost or self._is_of_another(holder)
        if self.lost:
            raise LeaseLostError(
                f"{self.path}: another start has taken over this run folder ({holder or 'unknown'}); this one stops "
                "and leaves the folder to it"
            )

    def release(self) -> None:
        """Ends the heartbeat and marks the lease as free, when it is still ours; a second call does nothing."""
        if self._thread is None or self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(self.heartbeat_seconds)
        if not self._thread.is_alive():  # it hangs in a write: then the lease goes stale
            self._us = replace(self._us, released=True)
            self._beat()

    def _patience(self, holder: Holder) -> float:
        return max(self.stale_seconds, 6 * holder.heartbeat_seconds)

    def _reason_to_take(self, holder: Holder | None, quiet: float) -> str | None:
        """Why the folder may be taken, empty when nobody needs to know; None when it may not."""
        us = self._us
        if holder is None or holder.released or holder.token == us.token:
            return ""
        if holder.is_dead_here(us.host):
            return "its process has ended"
        if holder.job_id is not None and holder.job_id == us.job_id and holder.restart_count < us.restart_count:
            return "SLURM has requeued its job"
        if quiet >= self._patience(holder):
            return f"it has been silent for {quiet:g} s"
        return None

    def _take(self, expected: Holder | None) -> bool:
        """Writes our name over `expected`; whether it is still there a moment later."""
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
        holder = self._read()
        return holder is not None and holder.token == self.token

    def _keep(self) -> None:
        while not self.lost and not self._stop.wait(self.heartbeat_seconds):
            self._beat()

    def _beat(self) -> None:
        """Rewrites the file unless it is another's; a file system that cannot do it now does not disturb the run."""
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

    def _is_of_another(self, holder: Holder | None) -> bool:
        return holder is not None and holder.token != self.token

    def _write_temporary(self) -> None:
        with open(self._temporary, "w") as file:
            file.write(self._us.to_json())
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> Holder | None:
        """The lease in the file; None when the file is absent or torn."""
        for attempt in range(3):
            try:
                return Holder.from_json(self.path.read_bytes())
            except FileNotFoundError:
                return None
            except OSError:  # a file that is replaced while it is read may be stale on NFS
                if attempt == 2:
                    raise
                time.sleep(0.2)
        raise AssertionError("three attempts return or raise")
