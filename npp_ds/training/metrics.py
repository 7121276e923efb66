"""What a run tells the world: metrics.jsonl, always; a progress bar on a terminal, plain lines elsewhere."""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from npp_ds.events import Event, read_events
from npp_ds.files import write_text_atomic


def _precedes(line: Event, step: int) -> bool:
    """Whether a line will not be written again by a run that goes on after `step` steps."""
    if line["event"] == "end":
        return False
    return line["step"] < step or (line["step"] == step and line["event"] != "stage")


class MetricsLog:
    """Appends events to metrics.jsonl. Opening it at step S forgets what an interrupted run wrote after step S."""

    def __init__(self, path: Path, step: int):
        before = read_events(path) if path.is_file() else []
        kept = [line for line in before if _precedes(line, step)]
        write_text_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.elapsed_before = max((line.get("elapsed_seconds", 0.0) for line in kept), default=0.0)
        self._file = open(path, "a")  # noqa: SIM115 - open as long as the run

    def write(self, event: str, step: int, **values: Any) -> None:
        """One line: what happened after `step` optimizer steps."""
        self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Progress:
    """Stage, step, loss, learning rate, images/s and time to go of a run, on the first rank's screen."""

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

    def show(self, line: Event, seconds_left: float) -> None:
        """The state after a logged step, as written to metrics.jsonl."""
        text = (
            f"stage {line['stage'] + 1}/{self.stages} side {line['patch_side']}  step {line['step']}/{self.total_steps}"
            f"  loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  {line['images_per_second']:.0f} images/s"
        )
        if self._bar:
            self._bar.update(self._task, completed=line["step"], description=text)
        else:
            print(f"{text}  eta {timedelta(seconds=round(seconds_left))}", flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
