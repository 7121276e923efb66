"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere, nothing from other processes."""

import sys
import time


class Progress:
    """Context manager; `advance(images)` after each batch. `crops` per image only changes what is shown."""

    def __init__(self, total: int, crops: int, shown: bool = True, seconds_between_lines: float = 5.0):
        self.total, self.crops, self.shown, self.pause = total, crops, shown, seconds_between_lines
        self.done = 0
        self.bar = None

    def __enter__(self) -> "Progress":
        self.started = self.printed = time.monotonic()
        if self.shown and sys.stderr.isatty():
            self.bar, self.task = _bar(self.total)
            self.bar.start()
        return self

    def advance(self, images: int) -> None:
        self.done += images
        if self.bar:
            self.bar.update(self.task, advance=images, rates=self.rates())
        elif self.shown and time.monotonic() - self.printed > self.pause:
            self.printed = time.monotonic()
            left = (self.total - self.done) * (self.printed - self.started) / self.done
            print(f"{self.done}/{self.total} images, {self.rates()}, {left:.0f} s left", file=sys.stderr, flush=True)

    def rates(self) -> str:
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        return f"{rate:.0f} images/s, {rate * self.crops:.0f} crops/s"

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()


def _bar(total: int):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"), TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True))
    return bar, bar.add_task("", total=total, rates="")
