"""A run between nodes survives a link that fails for a while, and ends with a code for requeueing when one stays away.

Nodes are network namespaces of this machine, each with its own address, loopback, host name and /dev/shm.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from benchmarks.nodes import Node, Nodes, start_ranks, wait_for_all, why_no_nodes
from launches import finish, last_step
from npp_ds.config.schema import RunConfig
from npp_ds.training.watchdog import STALLED
from runs import Outcome, assert_same, outcome_of, shards_in, tiny_config

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.skipif(why_no_nodes() is not None, reason=f"no network namespaces: {why_no_nodes()}"),
]
RUN = "import sys; from npp_ds.cli import main; sys.exit(main())"
STALL_SECONDS = 12
SLOW = 6e6
"""Bits per second of a link on which a step of the tiny run takes about a third of a second."""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> Iterator[list[Node]]:
    with Nodes(2, hosts=tmp_path_factory.mktemp("nodes") / "hosts") as found:
        yield found


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return shards_in(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Outcome:
    """The outcome of the run in two processes that share one machine and its loopback."""
    config = config_of(shards, tmp_path_factory.mktemp("twin"))
    finish(config)
    return outcome_of(config.directory)


def config_of(shards: Path, folder: Path) -> RunConfig:
    return tiny_config(
        shards, folder / "run", checkpoint={"every": 10, "keep_last": 9}, watch={"stall_seconds": STALL_SECONDS},
        logging={"every": 1, "samples": True},
    )  # fmt: skip


class OnNodes:
    """One process of `npp train` per node; a context manager that ends them. `before` precedes a node's command."""

    def __init__(
        self, nodes: list[Node], config: RunConfig, code: str = RUN, before: dict[int, list[str]] | None = None
    ):
        file = config.directory.with_name("run.yaml")
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        self.config, self.log = config, open(config.directory.with_name("run.out"), "ab")  # noqa: SIM115
        command = [sys.executable, "-c", code, "train", "--config", str(file)]
        self.processes = start_ranks(nodes, command, nodes[0].name, before or {}, stdout=self.log, stderr=self.log)

    def __enter__(self) -> "OnNodes":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.log.close()

    def wait_for(self, happened: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, self.text()
            assert any(process.poll() is None for process in self.processes), self.text()
            time.sleep(0.002)

    def wait_until_step(self, step: int) -> None:
        self.wait_for(lambda: last_step(self.config.directory) >= step)

    def is_saving(self, step: int) -> bool:
        """Whether this checkpoint is being written, or has just been: a save of the tiny run takes milliseconds."""
        return any(self.config.directory.glob(f"checkpoints/step-{step:08d}*"))

    def codes(self, seconds: float = 180) -> list[int]:
        return wait_for_all(self.processes, seconds)

    def text(self) -> str:
        return Path(self.log.name).read_text(errors="replace")


@pytest.fixture
def slow(nodes) -> Iterator[list[Node]]:
    """The nodes with slow links, in order again after the test."""
    for node in nodes:
        node.limit_rate(SLOW)
    yield nodes
    for node in nodes:
        node.join_link()
        node.limit_rate(0)
        node.lose_packets(0)


def test_network_nodes_meet_by_name_and_share_no_memory(nodes):
    assert [node.run("hostname").strip() for node in nodes] == ["n1", "n2"]
    nodes[0].run("touch", "/dev/shm/of-n1")
    assert nodes[1].run("ls", "/dev/shm") == ""
    assert nodes[0].run("getent", "hosts", "n2").split() == [nodes[1].address, "n2"]


@pytest.mark.parametrize("end", ["power_off", "kill"])
def test_network_nothing_is_left_of_nodes(tmp_path, end):
    """Neither after `power_off`, also of a node that was on twice, nor after a kill of the program that has them."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom benchmarks.nodes import Nodes\n"
        "with Nodes(2, Path(sys.argv[1])) as nodes:\n    for node in nodes:\n        node.power_off()\n"
        "        node.power_on()\n        node.run('sh', '-c', 'setsid sleep 600 >&- 2>&- &')\n"
        "    print(*(node.pid for node in nodes), flush=True)\n    sys.stdin.read()"
    )
    before = here()
    command = [sys.executable, "-c", code, tmp_path / "hosts"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        first = [int(pid) for pid in program.stdout.readline().split()]
        networks = {os.readlink(f"/proc/{pid}/ns/net") for pid in first}
        assert len(networks) == 2 and len(processes_in(networks)) == 6  # unshare, cat, sleep
        if end == "kill":
            program.kill()
    deadline = time.monotonic() + 10
    while processes_in(networks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_in(networks) and here() == before


def processes_in(networks: set[str]) -> list[int]:
    """The processes in these network namespaces; a zombie is in none."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.readlink(folder / "ns/net") in networks:
                found.append(int(folder.name))
    return found


def here() -> list[str]:
    """The interfaces and mounts of this machine."""
    return [*os.listdir("/sys/class/net"), Path("/proc/self/mounts").read_text()]


@pytest.mark.parametrize("when", ["in a step", "in a save", "with lost packets", "with a clock that is an hour ahead"])
def test_network_a_run_survives(slow, shards, tmp_path, undisturbed, when):
    config = config_of(shards, tmp_path)
    before = {1: ["faketime", "-f", "+1h"]} if "clock" in when else {}
    if before and shutil.which("faketime") is None:
        pytest.skip("no faketime: apt-get install faketime")
    if "packets" in when:
        for node in slow:
            node.lose_packets(0.02)
    with OnNodes(slow, config, before=before) as launch:
        if when in ("in a step", "in a save"):
            launch.wait_until_step(5)
            if when == "in a save":
                launch.wait_for(lambda: launch.is_saving(10))
            slow[1].cut_link()
            time.sleep(5)
            slow[1].join_link()
        assert launch.codes() == [0, 0], launch.text()
    assert_same(outcome_of(config.directory), undisturbed)


@pytest.mark.parametrize("when", ["in a step", "in a save"])
def test_network_a_link_that_stays_down_ends_the_run_which_then_resumes(slow, shards, tmp_path, undisturbed, when):
    config = config_of(shards, tmp_path)
    with OnNodes(slow, config) as launch:
        launch.wait_until_step(13 if when == "in a step" else 5)
        if when == "in a save":
            launch.wait_for(lambda: launch.is_saving(10))
        slow[0].cut_link()
        codes = launch.codes(STALL_SECONDS + 60)
        assert set(codes) <= {STALLED, 1}, launch.text()
    slow[0].join_link()
    with OnNodes(slow, config) as launch:
        assert launch.codes() == [0, 0], launch.text()
    assert_same(outcome_of(config.directory), undisturbed)


def test_network_nodes_wait_for_a_link_at_the_start(nodes, shards, tmp_path, undisturbed):
    config = config_of(shards, tmp_path)
    nodes[1].cut_link()
    try:
        with OnNodes(nodes, config) as launch:
            time.sleep(12)
            nodes[1].join_link()
            assert launch.codes() == [0, 0], launch.text()
    finally:
        nodes[1].join_link()
    assert_same(outcome_of(config.directory), undisturbed)


def test_network_a_link_that_is_down_at_the_start_ends_it_within_the_time_limit(nodes, shards, tmp_path):
    limit = (
        "import datetime, npp_ds.distributed.process_group as p; p.RENDEZVOUS_TIMEOUT = datetime.timedelta(seconds=8)\n"
    )
    nodes[1].cut_link()
    try:
        with OnNodes(nodes, config_of(shards, tmp_path), limit + RUN) as launch:
            assert launch.codes(60) == [1, 1], launch.text()
            assert launch.text().count("did not meet all 2 processes at n1:29500") == 2
            assert "Traceback" not in launch.text()
    finally:
        nodes[1].join_link()
