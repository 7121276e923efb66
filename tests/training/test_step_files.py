"""Few files take part in a training step: those that docs/architecture.md names."""

import re
import sys
import threading
from pathlib import Path

import pytest

import npp_ds
from npp_ds.training.trainer import Trainer
from runs import tiny_config

pytestmark = pytest.mark.processes

PACKAGE = Path(npp_ds.__file__).parent
PAGE = PACKAGE.parent / "docs/architecture.md"


def _files_of_steps(processes, config, first: int, last: int) -> set[str]:
    """The files of npp_ds whose code runs, in any thread, from the call of step `first` to that of step `last`."""
    trainer, found = Trainer(config, processes), set()
    step = trainer.engine.step

    def note(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            found.add(path.relative_to(PACKAGE).as_posix())

    def watched(number, *arguments):
        if number == first:
            found.clear()
            sys.setprofile(note)
        elif number == last:
            sys.setprofile(None)
            threading.setprofile(None)
            kept.update(found)
        return step(number, *arguments)

    kept: set[str] = set()
    trainer.engine.step = watched
    threading.setprofile(note)
    trainer.run()
    return kept


def test_the_files_that_run_between_two_steps_are_few_and_named_in_the_docs(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", logging={"every": 100}, validation={"every": 0})
    found = pair.run(_files_of_steps, config, 22, 26)[0]
    section = PAGE.read_text().split("## Files of a training step")[1].split("\n\nA moving")[0]
    named = set(re.findall(r"`([a-z_]+/[a-z_]+\.py)`", section))
    assert found - {"training/watchdog.py"} == named
    assert len(named) <= 12
