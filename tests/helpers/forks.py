"""Processes forked from a server that has imported torch and DeepSpeed, which takes a fresh process 5 s."""

import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

ON_CPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
PRELOADED = [
    "torch._dynamo", "deepspeed.runtime.engine", "deepspeed.runtime.zero.muon.muon_optimizer",
    "npp_ds.cli", "npp_ds.sampling.job", "npp_ds.tokenizer.encode", "npp_ds.training.trainer",
]  # fmt: skip


def fork_context() -> multiprocessing.context.ForkServerContext:
    """Return the start method whose server, started with the first process, has imported `PRELOADED`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, ON_CPU):  # the server's environment is that of its start
        forkserver.ensure_running()
    return context


class Fork:
    """A forked process with the methods of `subprocess.Popen` that the tests use.

    Calls `function(*arguments)` in `folder` with the variables of `environment`; what it prints is appended to the file
    `output`, errors to `errors` if given.
    """

    def __init__(
        self, function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str], output: Path,
        errors: Path | None = None, folder: Path | None = None,
    ):  # fmt: skip
        streams = (output, errors or output)
        work = (function, arguments, dict(environment), streams, folder or Path.cwd())
        self._process = fork_context().Process(target=_work, args=work)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _work(function: Callable[..., Any], arguments: tuple, environment: dict, streams: tuple, folder: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    os.chdir(folder)
    function(*arguments)


def run_main(module: str, *arguments: str) -> None:
    """Call `main()` of a module, or run a script, with these words of a command line, as `python` would."""
    sys.argv = [module, *arguments]
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        importlib.import_module(module).main()


def run_forked(
    module: str, *arguments: str | Path, environment: Mapping[str, str] = os.environ, folder: Path | None = None,
    timeout: float = 120, main: Callable[..., None] = run_main,
) -> subprocess.CompletedProcess:  # fmt: skip
    """Return exit code and output of `main`, here `run_main`, in a forked process on the CPU, as `subprocess.run` does.

    Raises subprocess.TimeoutExpired, and kills the process, after `timeout` seconds.
    """
    words = [str(word) for word in arguments]
    with tempfile.TemporaryDirectory() as place:
        streams = {name: Path(place) / name for name in ("output", "errors")}
        process = Fork(main, module, *words, environment={**environment, **ON_CPU}, folder=folder, **streams)
        try:
            process.wait(timeout)
        finally:
            process.kill()
        texts = [stream.read_text() for stream in streams.values()]
    return subprocess.CompletedProcess([module, *words], process.returncode, *texts)
