"""A real SLURM on this machine: munged, slurmctld and a few slurmd, on free ports, ended by process id."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from workers import free_port

ROOT = Path(__file__).parents[2]
NODES = ("n1", "n2", "n3")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
MARK = "SLURM_TEST_DAEMON"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def why_not() -> str | None:
    """Why no cluster can be started here; None when it can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "SLURM's daemons and its nodes' daemons run as root here"
    return None


class SlurmCluster:
    """Nodes that share this host, each with its own slurmd, port and spool folder; a context manager that ends them.

    A node that is silent for ten seconds is down; a requeued job may start again after a few.
    """

    def __init__(self, nodes: tuple[str, ...] = NODES):
        self.nodes = nodes
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
        self._daemons: dict[str, subprocess.Popen] = {}
        self._log = open(self.folder / "daemons.log", "ab")  # noqa: SIM115 - open as long as the cluster
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.environment = {**own, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> "SlurmCluster":
        try:
            self._start_munge()
            self._configure()
            self.start_controller()
            for node in self.nodes:
                self.start_node(node)
            self.wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        for node in self.nodes:
            self.kill_node(node)
        for name in ("slurmctld", "munged"):
            if daemon := self._daemons.pop(name, None):
                daemon.kill()
                daemon.wait()
        self._log.close()
        shutil.rmtree(self.folder)

    def _start_munge(self) -> None:
        key, here = self.folder / "munge.key", self.folder
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        files = {"key-file": key, "socket": here / "munge", "pid-file": here / "munge.pid", "seed-file": here / "seed"}
        options = [f"--{name}={file}" for name, file in files.items()]
        log = f"--log-file={here / 'munge.log'}"
        self._start("munged", "munged", "--foreground", "--force", "--num-threads=2", log, *options)
        wait_for((here / "munge").exists, 30, self._problem)

    def _configure(self) -> None:
        host, here = socket.gethostname(), self.folder
        for name in ("state", *self.nodes):
            (here / name).mkdir()
        lines = [
            "ClusterName=tests",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={free_port()}",
            # A requeued job waits until its old credentials have expired.
            f"AuthInfo=socket={here}/munge,cred_expire=6",
            "SlurmUser=root",
            "SlurmdUser=root",
            f"StateSaveLocation={here}/state",
            f"SlurmctldPidFile={here}/slurmctld.pid",
            f"SlurmctldLogFile={here}/slurmctld.log",
            f"SlurmdSpoolDir={here}/%n",
            f"SlurmdPidFile={here}/%n.pid",
            f"SlurmdLogFile={here}/%n.log",
            "SlurmdParameters=config_overrides",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SwitchType=switch/none",
            "MpiDefault=none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core_Memory",
            "SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1",
            "AccountingStorageType=accounting_storage/none",
            "JobAcctGatherType=jobacct_gather/none",
            "JobCompType=jobcomp/none",
            "ReturnToService=2",
            "SlurmdTimeout=10",
            "KillWait=20",
            "GresTypes=gpu",
            *(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=64 RealMemory=2000000"
                for node in self.nodes
            ),
            f"PartitionName=all Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP",
        ]
        (here / "slurm.conf").write_text("\n".join(lines) + "\n")

    def start_controller(self) -> None:
        self._start("slurmctld", "slurmctld", "-D")

    def stop_controller(self) -> None:
        """As for a restart of its machine: it writes down what it knows, and nobody answers until it is started."""
        daemon = self._daemons.pop("slurmctld")
        daemon.terminate()
        daemon.wait(60)

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """As if the machine lost power: kill -9 for its slurmd, every slurmstepd and all tasks under them."""
        daemon = self._daemons.pop(node, None)
        if daemon is None:
            return
        daemon.send_signal(signal.SIGSTOP)  # so that it starts nothing meanwhile
        doomed = {pid for one in self._processes_of(node) for pid in (one, *descendants(one))}
        for pid in doomed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()
        wait_for(lambda: not any(is_alive(pid) for pid in doomed), 30, lambda: f"of {node} there live on {doomed}")

    def submit(self, *arguments: str | Path, **environment: str) -> "Job":
        """`sbatch` with these arguments and variables, in the root of the repository."""
        own = {**self.environment, **environment}
        command = ["sbatch", "--parsable", *map(str, arguments)]
        done = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return Job(self, int(done.stdout))

    def ask(self, *command: str) -> str:
        """What one of SLURM's commands prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def wait_for_nodes(self) -> None:
        """Returns when all nodes are idle."""
        wait_for(lambda: self._states() == ["idle"] * len(self.nodes), 90, self._problem)

    def _states(self) -> list[str]:
        done = subprocess.run(
            ["sinfo", "-hN", "-o", "%T"], env=self.environment, capture_output=True, text=True, timeout=60
        )
        return done.stdout.split()

    def _start(self, name: str, program: str, *arguments: str) -> None:
        command = [shutil.which(program, path=self.environment["PATH"]), *arguments]
        self._daemons[name] = subprocess.Popen(
            command,
            env={**self.environment, MARK: f"{self.folder}/{name}"},
            stdout=self._log,
            stderr=self._log,
            cwd=self.folder,
            start_new_session=True,
        )

    def _processes_of(self, node: str) -> list[int]:
        """Its slurmd and the slurmstepd that it has started, which inherit its environment; tasks do not."""
        mark = f"{MARK}={self.folder}/{node}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def _problem(self) -> str:
        logs = [self.folder / name for name in ("daemons.log", "slurmctld.log", *(f"{n}.log" for n in self.nodes))]
        tails = (f"{log.name}:\n" + "\n".join(log.read_text().splitlines()[-15:]) for log in logs if log.is_file())
        return f"nodes are {self._states()}\n" + "\n".join(tails)


class Job:
    """A submitted batch job."""

    def __init__(self, cluster: SlurmCluster, number: int | str):
        self.cluster, self.number = cluster, number  # a task of an array: "7_2"

    def shown(self) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        text = self.cluster.ask("scontrol", "-o", "show", "job", str(self.number))
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    @property
    def state(self) -> str:
        return self.shown()["JobState"]

    def wait_for_end(self, timeout: float = 240) -> str:
        """The state in which it stays."""
        wait_for(lambda: self.state in ENDED, timeout, lambda: f"{self.shown()}\n{self.log()}")
        return self.state

    def log(self) -> str:
        """What it has printed."""
        path = Path(self.shown()["StdOut"])
        return path.read_text(errors="replace") if path.is_file() else ""

    def tasks(self) -> dict[str, int]:
        """The process of `npp_ds` on each of its nodes, while a step runs."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = dict(v.partition("=")[::2] for v in (folder / "environ").read_text().split("\0"))
                mine = variables.get("SLURM_CONF") == self.cluster.environment["SLURM_CONF"]
                if mine and variables.get("SLURM_JOB_ID") == str(self.number) and "SLURM_STEP_ID" in variables:
                    words = (folder / "cmdline").read_text().split("\0")
                    if words[1:3] == ["-m", "npp_ds"]:
                        found[variables["SLURMD_NODENAME"]] = int(folder.name)
        return found

    def wait_for_restart(self, timeout: float = 120) -> None:
        wait_for(lambda: self.shown()["Restarts"] != "0", timeout, lambda: f"{self.shown()}\n{self.log()}")


def wait_for(happened: Callable[[], bool], timeout: float, describe: Callable[[], str]) -> None:
    """Looks until `happened()`; AssertionError with `describe()` when it has not after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline, f"not in {timeout} s: {describe()}"
        time.sleep(0.2)


def descendants(pid: int) -> list[int]:
    children = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            children += map(int, task.read_text().split())
    return children + [below for child in children for below in descendants(child)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
