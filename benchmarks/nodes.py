"""A small cluster on this machine: nodes that are network namespaces, with links that can be slowed, cut and counted.

Each node has its own network interface and loopback, host name, /dev/shm and processes, so that processes on two nodes
meet by address and share neither memory nor a loopback. The nodes' links meet in a bridge, which has a namespace of its
own. A node ends with its first process, and that with the program that has started it, whatever ends the program: no
namespace, interface or process is left. Needs Linux, root, and the commands in `COMMANDS`.
"""

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

COMMANDS = ("ip", "tc", "unshare", "nsenter", "setpriv", "mount")
INTERFACE = "eth0"
NETWORK = "10.213.0"
"""First three bytes of the nodes' addresses, which only the namespaces know."""
# The first process of a node: it says that it is ready, then reads its input, which ends with the program.
FIRST_PROCESS = """
set -e
hostname "$1"
ip link set lo up
mount -t tmpfs -o size=2g none /dev/shm
if [ -n "$2" ]; then mount --bind "$2" /etc/hosts; fi
echo ready
exec env --ignore-signal=CHLD cat  # so that no orphan stays a zombie
"""


def why_no_nodes() -> str | None:
    """Return why this machine cannot have nodes, None if it can."""
    if missing := [name for name in COMMANDS if shutil.which(name) is None]:
        return f"no {', '.join(missing)}: apt-get install iproute2 util-linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    done = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return "this container may not create network namespaces" if done.returncode else None


class Node:
    """One node: its name, its address, and its first process, in whose namespaces the others run.

    `hosts` is its /etc/hosts, and its link leads to `switch`. It is off until `power_on`.
    """

    def __init__(self, name: str, address: str = "", hosts: Path | None = None, switch: "Node | None" = None):
        self.name, self.address = name, address
        self._hosts, self._switch = hosts, switch
        self._first: subprocess.Popen | None = None

    def power_on(self) -> None:
        """Start the first process in new namespaces and join the link. Raises RuntimeError if one of them fails."""
        namespaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["unshare", *namespaces, "sh", "-c", FIRST_PROCESS, "sh", self.name, str(self._hosts or "")]
        first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert first.stdout is not None
        if first.stdout.readline() != "ready\n":
            first.kill()
            raise RuntimeError(f"node {self.name} could not be made; the reason is printed above")
        self.pid = int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text())
        self._first, self._ended = first, os.pidfd_open(self.pid)
        if self._switch:
            _run(
                *("ip", "link", "add", self.name, "netns", str(self._switch.pid), "type", "veth"),
                *("peer", "name", INTERFACE, "netns", str(self.pid)),
            )
            self._switch.run("ip", "link", "set", self.name, "master", "bridge", "up")
            self.run("ip", "address", "add", f"{self.address}/24", "dev", INTERFACE)
            self.join_link()

    def inside(self, *command: str) -> list[str]:
        """Return the command that runs `command` on this node."""
        return [
            "nsenter",
            f"--target={self.pid}",
            "--net",
            "--uts",
            "--mount",
            "--pid",
            f"--wd={os.getcwd()}",
            "--",
            *("setpriv", "--pdeathsig", "KILL"),  # if nsenter is killed
            *command,
        ]

    def start(self, *command: str, **options: Any) -> subprocess.Popen:
        """Start a process on this node, with the options of `subprocess.Popen`."""
        return subprocess.Popen(self.inside(*command), **options)

    def run(self, *command: str, **options: Any) -> str:
        """Run a command on this node to its end; return what it prints. Raises RuntimeError if it fails.

        `options` are those of `subprocess.run`.
        """
        return _run(*self.inside(*command), **options)

    def sent_bytes(self) -> int:
        """Return the bytes that this node has sent over its link, with the headers of Ethernet, IP and TCP."""
        (link,) = json.loads(self.run("ip", "-json", "-statistics", "link", "show", INTERFACE))
        return link["stats64"]["tx"]["bytes"]

    def limit_rate(self, bits_per_second: float) -> None:
        """Let this node send at most so many bits per second; 0 removes the limit."""
        if bits_per_second:
            burst = max(64_000, int(bits_per_second / 8 / 250))  # four milliseconds, at least a large TCP segment
            rate = ("rate", f"{int(bits_per_second)}bit", "burst", f"{burst}", "latency", "100ms")
            self.run("tc", "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *rate)
        else:
            with suppress(RuntimeError):  # there was no limit
                self.run("tc", "qdisc", "del", "dev", INTERFACE, "root")

    def lose_packets(self, share: float) -> None:
        """Drop this share of the packets that arrive at this node at random; 0 drops none."""
        self.run("iptables", "--flush", "INPUT")
        if share:
            chance = ("-m", "statistic", "--mode", "random", "--probability", f"{share}")
            self.run("iptables", "--append", "INPUT", "--in-interface", INTERFACE, *chance, "--jump", "DROP")

    def cut_link(self) -> None:
        """Take this node's interface down: nothing arrives, and nothing says so to the other nodes."""
        self.run("ip", "link", "set", INTERFACE, "down")

    def join_link(self) -> None:
        """Take this node's interface up again."""
        self.run("ip", "link", "set", INTERFACE, "up")

    def power_off(self) -> None:
        """Remove this node's link, then kill all its processes at once: the other nodes hear nothing of it."""
        if self._first is None:
            return
        if self._switch and self._first.poll() is None:
            with suppress(RuntimeError):  # the link was not made yet
                self._switch.run("ip", "link", "del", self.name)
        self._first.kill()  # the kernel then kills the first process, and that one's end all others
        self._first.wait()
        select.select([self._ended], [], [], 10)  # longer if processes stay zombies because nobody waits for them
        os.close(self._ended)
        for pipe in filter(None, (self._first.stdin, self._first.stdout)):
            pipe.close()
        self._first = None


class Nodes:
    """`count` nodes n1, n2, .. that reach each other, and `others` by name; a context manager that ends them all.

    `hosts` is a file to write, in which the nodes look up each other's names; without it they meet by address.
    """

    def __init__(self, count: int, hosts: Path | None = None, others: Sequence[str] = ()):
        names = [*(f"n{number + 1}" for number in range(count)), *others]
        self._hosts, self._switch = hosts, Node("switch")
        self._nodes = [Node(name, f"{NETWORK}.{number + 1}", hosts, self._switch) for number, name in enumerate(names)]

    def __enter__(self) -> "list[Node]":
        try:
            if self._hosts:
                lines = ["127.0.0.1 localhost", *(f"{node.address} {node.name}" for node in self._nodes)]
                self._hosts.write_text("\n".join(lines) + "\n")
            self._switch.power_on()
            self._switch.run("ip", "link", "add", "bridge", "type", "bridge")
            self._switch.run("ip", "link", "set", "bridge", "up")
            for node in self._nodes:
                node.power_on()
        except BaseException:
            self.__exit__()
            raise
        return self._nodes

    def __exit__(self, *exception: object) -> None:
        for node in (*self._nodes, self._switch):
            node.power_off()


def start_ranks(
    nodes: Sequence[Node], command: Sequence[str], master: str, before: Mapping[int, Sequence[str]] = {}, **options: Any
) -> list[subprocess.Popen]:
    """Start a launch of one process with one thread per node, which meet at `master`, an address or a name.

    `before` holds words to put before the command of a rank; `options` are those of `subprocess.Popen`.
    """
    common = {
        **os.environ,
        "WORLD_SIZE": str(len(nodes)),
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": master,
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return [
        node.start(*before.get(rank, ()), *command, env={**common, "RANK": str(rank)}, **options)
        for rank, node in enumerate(nodes)
    ]


def _run(*command: str, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or f'ended with {done.returncode}'}")
    return done.stdout


def wait_for_all(processes: Sequence[subprocess.Popen], seconds: float) -> list[int]:
    """Return the exit codes of processes; RuntimeError, with all of them killed, if one runs longer than `seconds`."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not ended within {seconds:g} s: {error.cmd}") from error
    finally:
        for process in processes:
            process.kill()
