"""A small cluster on this machine: nodes that are network namespaces, with links that can be slowed, cut and counted.

Each node has its own network interface and loopback, host name, /dev/shm and processes, so that processes on two nodes
meet by address and share neither memory nor a loopback. The nodes' links meet in a bridge, which has a namespace of its
own. A node ends with its first process, and that with the program that has started it, whatever ends the program: no
namespace, interface or process is left. Needs Linux, root, and the commands in `COMMANDS`.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

COMMANDS = ("ip", "tc", "unshare", "nsenter", "mount")
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
exec cat
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
    """One node: its name, its address, and its first process, in whose namespaces the others run."""

    def __init__(self, name: str, address: str, hosts: Path | None = None):
        self.name, self.address = name, address
        namespaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["unshare", *namespaces, "sh", "-c", FIRST_PROCESS, "sh", name, str(hosts or "")]
        self._first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._first.stdout is not None
        if self._first.stdout.readline() != "ready\n":
            self._first.kill()
            raise RuntimeError(f"node {name} could not be made; the reason is printed above")
        self.pid = int(Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text())

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
            *command,
        ]

    def start(self, *command: str, **options: Any) -> subprocess.Popen:
        """Start a process on this node, with the options of `subprocess.Popen`."""
        return subprocess.Popen(self.inside(*command), **options)

    def run(self, *command: str) -> str:
        """Run a command on this node to its end; return what it prints. Raises RuntimeError if it fails."""
        return _run(*self.inside(*command))

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
        """Kill all processes of this node at once and remove its interface."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, 9)
        self._first.kill()
        self._first.wait()
        for pipe in filter(None, (self._first.stdin, self._first.stdout)):
            pipe.close()


class Nodes:
    """`count` nodes that reach each other; a context manager that ends them with all their processes.

    `hosts` is a file to write, in which the nodes look up each other's names; without it they meet by address.
    """

    def __init__(self, count: int, prefix: str = "n", hosts: Path | None = None):
        self.names = [f"{prefix}{number + 1}" for number in range(count)]
        self._hosts, self._nodes, self._bridge = hosts, [], None

    def __enter__(self) -> "list[Node]":
        try:
            addresses = {name: f"{NETWORK}.{number + 1}" for number, name in enumerate(self.names)}
            if self._hosts:
                lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
                self._hosts.write_text("\n".join(lines) + "\n")
            self._bridge = Node("switch", "")
            self._bridge.run("ip", "link", "add", "bridge", "type", "bridge")
            self._bridge.run("ip", "link", "set", "bridge", "up")
            for number, (name, address) in enumerate(addresses.items()):
                node = Node(name, address, self._hosts)
                self._nodes.append(node)
                self._connect(node, f"port{number}")
        except BaseException:
            self.__exit__()
            raise
        return self._nodes

    def __exit__(self, *exception: object) -> None:
        for node in (*self._nodes, *([self._bridge] if self._bridge else [])):
            node.power_off()

    def _connect(self, node: Node, port: str) -> None:
        """Join the node to the bridge by a pair of interfaces. Raises RuntimeError if the link does not come up."""
        switch = self._bridge
        assert switch is not None
        _run(
            *("ip", "link", "add", port, "netns", str(switch.pid), "type", "veth"),
            *("peer", "name", INTERFACE, "netns", str(node.pid)),
        )
        switch.run("ip", "link", "set", port, "master", "bridge", "up")
        node.run("ip", "address", "add", f"{node.address}/24", "dev", INTERFACE)
        node.join_link()


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


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
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
