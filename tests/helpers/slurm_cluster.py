"""A real SLURM on nodes that are namespaces of this machine: one for the controller and three for jobs."""

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from benchmarks.nodes import INTERFACE, Node, Nodes, why_no_nodes

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
SEARCH_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def why_not() -> str | None:
    """Return why no cluster can be started here, None if it can."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
    return why_no_nodes()


class SlurmCluster:
    """Nodes n1, n2, n3 that share this machine's disk, and a controller's node; a context manager that ends them.

    They meet by name, over a bridge. Each has its own munged, and n1 to n3 a slurmd. SLURM's commands run on the
    controller's node. A node that is silent for ten seconds is down; a requeued job may start again after a few.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.environment = {**own, "PATH": SEARCH_PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._nodes = Nodes(3, self.folder / "hosts", others=["controller"])

    def __enter__(self) -> "SlurmCluster":
        try:
            *nodes, self._controller = self._nodes.__enter__()
            self.nodes = {node.name: node for node in nodes}
            self._configure()
            self._start_munge(self._controller)
            # The controller sees within a second that no host has the address of a node without power; as the kernel is
            # set, it asks for half a minute, and SLURM 22.05 waits for the end of each request before the next.
            for setting in ("base_reachable_time_ms=1000", "delay_first_probe_time=0", "retrans_time_ms=100"):
                self.ask("sysctl", "-qw", f"net.ipv4.neigh.{INTERFACE}.{setting}")
            self.start_controller()
            for node in nodes:
                self._start_daemons(node)
            self.wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._nodes.__exit__()
        shutil.rmtree(self.folder)

    def _configure(self) -> None:
        here = self.folder
        key = here / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        for name in ("state", "own", *self.nodes):
            (here / name).mkdir()
        lines = [
            "ClusterName=tests",
            "SlurmctldHost=controller",
            # A requeued job waits until its old credentials have expired.
            f"AuthInfo=socket={here}/own/munge,cred_expire=6",
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
            f"NodeName={','.join(self.nodes)} CPUs=64 RealMemory=2000000",
            f"PartitionName=all Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP",
        ]
        (here / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _start_munge(self, node: Node) -> None:
        """Start a node's munged, whose socket lies on a file system that other nodes do not see."""
        own = self.folder / "own"
        node.run("mount", "-t", "tmpfs", "none", str(own))
        files = {"socket": own / "munge", "pid-file": own / "pid", "seed-file": own / "seed", "log-file": own / "log"}
        options = [f"--{name}={file}" for name, file in {**files, "key-file": self.folder / "munge.key"}.items()]
        node.run("munged", "--force", "--num-threads=2", *options, env=self.environment)

    def start_controller(self) -> None:
        self.ask("slurmctld")

    def stop_controller(self) -> None:
        """As for a restart of its machine: it writes down what it knows, and nobody answers until it is started."""
        self.ask("scontrol", "shutdown", "slurmctld")
        wait_for(lambda: "slurmctld" not in self.ask("ps", "-eo", "comm"), 60, self._problem)

    def start_node(self, name: str) -> None:
        """Switch on a node that `kill_node` has switched off."""
        self.nodes[name].power_on()
        self._start_daemons(self.nodes[name])

    def _start_daemons(self, node: Node) -> None:
        self._start_munge(node)
        node.run("slurmd", env=self.environment)

    def kill_node(self, name: str) -> None:
        """As if the machine lost power: its link is gone, and all its processes end at once."""
        self.nodes[name].power_off()

    def submit(self, *arguments: str | Path, **environment: str) -> "Job":
        """`sbatch` with these arguments and variables, in the root of the repository."""
        command = ["env", f"--chdir={ROOT}", "sbatch", "--parsable", *map(str, arguments)]
        return Job(self, int(self.ask(*command, **environment)))

    def ask(self, *command: str, **environment: str) -> str:
        """What a command on the controller's node prints."""
        return self._controller.run(*command, env={**self.environment, **environment}, timeout=60)

    def wait_for_nodes(self) -> None:
        """Returns when all nodes are idle."""
        wait_for(lambda: self._states() == ["idle"] * len(self.nodes), 90, self._problem)

    def _states(self) -> list[str]:
        with suppress(RuntimeError):  # the controller does not answer yet
            return self.ask("sinfo", "-hN", "-o", "%T").split()
        return []

    def _problem(self) -> str:
        logs = [self.folder / f"{name}.log" for name in ("slurmctld", *self.nodes)]
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

    def wait_for_end(self, timeout: float = 400) -> str:
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
