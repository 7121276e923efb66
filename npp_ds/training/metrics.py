"""What a run tells the world: metrics.jsonl, always; a progress bar on a terminal, plain lines elsewhere."""

import json
import os
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from npp_ds.training.events import Event, read_events
from npp_ds.utils.files import write_text_atomic


class StepLog:
    """A file of JSON lines, each with the step it was written after; opened at step S it forgets all later ones.

    A line that cannot be written (a full disk) waits in memory and goes out before the next one.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self.kept: list[Event] = []
        self._waiting: list[bytes] = []  # whole lines, of the first of which `_sent` bytes are in the file
        self._sent = 0
        self._descriptor: int | None = None
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Forgets what was written after `step` steps."""
        before = read_events(self.path) if self.path.is_file() else []
        before += [json.loads(line) for line in self._waiting]
        self.kept = [line for line in before if self.precedes(line, step)]
        write_text_atomic(self.path, "".join(json.dumps(line) + "\n" for line in self.kept))
        self._waiting, self._sent = [], 0
        self.close()
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def precedes(self, line: Event, step: int) -> bool:
        """Whether a line will not be written again by a run that goes on after `step` steps."""
        return line["step"] <= step

    def write(self, event: str, step: int, **values: Any) -> None:
        """One line: what happened after `step` optimizer steps."""
        self._waiting.append((json.dumps({"event": event, "step": step, **values}) + "\n").encode())
        self._flush()

    def sync(self) -> None:
        """Makes what is written survive a power cut."""
        self._flush()
        with suppress(OSError):
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor is not None:
            self._flush()
            os.close(self._descriptor)
            self._descriptor = None

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._sent += os.write(self._descriptor, self._waiting[0][self._sent :])
                if self._sent == len(self._waiting[0]):
                    self._waiting.pop(0)
                    self._sent = 0
        except OSError as error:
            with suppress(OSError):
                print(f"WARNING: {self.path}: {error.strerror}; lines wait in memory", file=sys.stderr, flush=True)


class MetricsLog(StepLog):
    """The events of a run in metrics.jsonl."""

    def precedes(self, line: Event, step: int) -> bool:
        if line["event"] == "end":
            return False
        return line["step"] < step or (line["step"] == step and line["event"] != "stage")

    @property
    def elapsed_before(self) -> float:
        """Seconds of training in the kept lines."""
        return max((line.get("elapsed_seconds", 0.0) for line in self.kept), default=0.0)


class Progress:
    """Stage, step, loss, learning rate, images/s, MFU and time to go of a run, on the first rank's screen."""

    def __init__(self, total_steps: int, first_step: int, stages: int):
        self.total_steps, self.stages = total_steps, stages
        self._bar = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.percentage:3.0f}%"))
            self._bar = Progress(*columns, TextColumn("eta"), TimeRemainingColumn())
            self._task = self._bar.add_task("starting", total=total_steps, completed=first_step)
            self._bar.start()

    def say(self, text: str) -> None:
        """A line that stays."""
        (self._bar.console.print(text, highlight=False, markup=False) if self._bar else print(text, flush=True))

    def show(self, line: Event, seconds_per_step: float) -> None:
        """The state after a logged step, as written to metrics.jsonl."""
        text = (
            f"stage {line['stage'] + 1}/{self.stages} side {line['patch_side']}  step {line['step']}/{self.total_steps}"
            f"  loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  {line['images_per_second']:.0f} images/s"
        )
        if line["mfu"] is not None:
            text += f"  MFU {line['mfu']:.1%}"
        if self._bar:
            self._bar.update(self._task, completed=line["step"], description=text)
        else:
            seconds_left = (self.total_steps - line["step"]) * seconds_per_step
            print(f"{text}  eta {timedelta(seconds=round(seconds_left))}", flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
