"""Real launches of `npp train`: processes of their own that can be signalled and killed, and that never stay behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from forks import Fork, run_main
from npp_ds.config.schema import RunConfig
from workers import free_port


class Launch:
    """`world_size` processes of one `npp train`, as a launcher would start them; a context manager that ends them.

    What they print is appended to the file `output`, one beside the run folder unless given. They are forked with the
    imports done unless `forked` is false: then each is a `python -m npp_ds`.
    """

    def __init__(
        self, config: RunConfig, world_size: int = 2, *arguments: str, output: Path | None = None, forked: bool = True
    ):
        self.run_dir = config.directory
        self.file = self.run_dir.with_name(f"{self.run_dir.name}.yaml")
        self.file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        self.world_size, port = world_size, free_port()
        self.output = output or self.run_dir.with_name(f"{self.run_dir.name}.out")
        self._log = open(self.output, "ab")  # noqa: SIM115 - open as long as the launch
        self.began_at = self._log.tell()
        self.processes: list[subprocess.Popen | Fork] = []
        common = {
            **os.environ, "WORLD_SIZE": str(world_size), "LOCAL_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        command = ["train", "--config", str(self.file), *arguments]
        try:
            for rank in map(str, range(world_size)):
                env = {**common, "RANK": rank, "LOCAL_RANK": rank}
                if forked:
                    self.processes.append(Fork(run_main, "npp_ds.cli", *command, environment=env, output=self.output))
                else:
                    program, streams = [sys.executable, "-m", "npp_ds"], {"stdout": self._log, "stderr": self._log}
                    self.processes.append(subprocess.Popen([*program, *command], env=env, **streams))
        except BaseException:  # an interrupt, say
            self.__exit__()
            raise

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *exception) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self._log.close()

    def wait_until_step(self, step: int, timeout: float = 120) -> None:
        """Returns once a line of the run's metrics says that `step` steps are done, or all processes have ended."""
        deadline = time.monotonic() + timeout
        while self.last_step() < step and any(p.poll() is None for p in self.processes):
            assert time.monotonic() < deadline, f"step {step} not reached in {timeout} s:\n{self.text()}"
            time.sleep(0.01)

    def wait_for_imports(self, rank: int, timeout: float = 60) -> None:
        """Returns once the process of `rank`, not a forked one, is importing PyTorch: it notes signals by then."""
        maps, deadline = Path(f"/proc/{self.processes[rank].pid}/maps"), time.monotonic() + timeout
        while "libtorch" not in maps.read_text():
            assert time.monotonic() < deadline and self.processes[rank].poll() is None, self.text()
            time.sleep(0.002)

    def last_step(self) -> int:
        return last_step(self.run_dir)

    def send(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)

    def exit_codes(self, timeout: float = 120) -> list[int]:
        """Waits for all processes; those that are left after `timeout` seconds are an AssertionError."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still running after {timeout} s:\n{self.text()}") from None
        return [process.returncode for process in self.processes]

    def text(self) -> str:
        """What this launch has printed so far."""
        with open(self.output, "rb") as file:
            file.seek(self.began_at)
            return file.read().decode(errors="replace")


def last_step(run_dir: Path) -> int:
    """Steps that are done, says the last whole line of training in a run's metrics."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    steps = [line for line in lines if line.startswith('{"event": "train"')]
    return int(steps[-1].split('"step": ')[1].split(",")[0]) if steps else 0


def finish(config: RunConfig, world_size: int = 2, *arguments: str, timeout: float = 180) -> str:
    """Runs to the end and returns what was printed; anything but exit code 0 on all ranks is an AssertionError."""
    with Launch(config, world_size, *arguments) as launch:
        codes = launch.exit_codes(timeout)
        assert codes == [0] * world_size, f"{codes}:\n{launch.text()}"
        return launch.text()
