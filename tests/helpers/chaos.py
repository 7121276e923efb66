"""Chaos: a run that is killed, signalled, damaged and resized at random must end as if nothing had happened to it.

    python tests/helpers/chaos.py --minutes 10 --seed 3                   1, 2 and 4 processes, any ZeRO stage
    python tests/helpers/chaos.py --minutes 10 --seed 3 --constant-world  2 processes, one ZeRO stage: equal bit for bit

Every choice comes from one random.Random(seed) and stands in chaos.log with its time. A seed repeats the kinds of
trouble, not its moments: where exactly a kill hits cannot be repeated, and what it hits decides what can come next.
"""

import argparse
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch

from launches import Launch, last_step
from npp_ds.config.schema import RunConfig
from npp_ds.training.preemption import PREEMPTED
from runs import NO_DROPOUT, outcome_of, shards_in, tiny_config

KEYS = {
    "model": NO_DROPOUT,
    "schedule": {"epochs": 48},  # 120, 120 and 240 steps of sides 4, 2 and 1
    "optimizer": {"learning_rate": 1e-3, "ema_decay": 0.99},
    "validation": {"every": 45, "batch_size": 8, "weights": "both"},
    "logging": {"every": 1, "samples": True},
    "watch": {"stall_seconds": 60, "spike_window": 0},  # what a spike is compared with begins anew at every start
}
LIMIT = 150  # seconds without a printed line after which a start hangs
MARK = "damaged-by-chaos"  # lies in a checkpoint folder for as long as the damage does
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def require(holds: bool, promise: str, found: object) -> None:
    if not holds:
        raise AssertionError(f"{promise}\n{found}")


# Damage between two starts


def resumable(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that are complete and that we have not damaged, newest first."""
    folders = (run_dir / "checkpoints").glob("step-*/COMPLETE.json")
    named = [f.parent for f in folders if re.fullmatch(r"step-\d+", f.parent.name)]
    return sorted((int(f.name[5:]) for f in named if not (f / MARK).exists()), reverse=True)


def hurt(rng: random.Random, path: Path) -> str:
    """Truncates a file, flips one of its bits or deletes it; says what."""
    how, content = rng.choice(["truncated", "bit-flipped", "deleted"]), bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: rng.randrange(max(1, len(content) - 1))])  # more than the newline at its end
    elif content:
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
    return f"{path.name} {how}"


def damage_checkpoint(rng: random.Random, run_dir: Path) -> str | None:
    """Hurts a file of a complete checkpoint, the newest more often than not, or deletes it all; never the last one."""
    steps = resumable(run_dir)
    if len(steps) < 2:
        return None
    folder = run_dir / "checkpoints" / f"step-{rng.choice([steps[0], rng.choice(steps)]):08d}"
    if rng.random() < 0.2:
        shutil.rmtree(folder)
        return f"{folder.name} deleted"
    file = rng.choice(sorted(folder.iterdir()))
    (folder / MARK).touch()
    return f"{folder.name}/{hurt(rng, file)}"


def damage_latest(rng: random.Random, run_dir: Path) -> str | None:
    latest = run_dir / "checkpoints" / "latest"
    return hurt(rng, latest) if latest.is_file() else None


def tear_log(rng: random.Random, run_dir: Path) -> str | None:
    """Cuts a part off the last line of a log: only its newline where no start will write the line again."""
    path = run_dir / rng.choice(["metrics.jsonl", "sample_log.jsonl"])
    content = path.read_bytes() if path.is_file() else b""
    if not content.endswith(b"\n"):
        return None
    line = content.splitlines(keepends=True)[-1]
    is_written_again = json.loads(line)["step"] > max(resumable(run_dir), default=0)
    cut = rng.randint(1, len(line)) if is_written_again else 1
    path.write_bytes(content[:-cut])
    return f"{path.name}: the last {cut} of {len(line)} bytes of the last line cut off"


def remove_staged_cache(rng: random.Random, run_dir: Path) -> str | None:
    shutil.rmtree(run_dir.parent / "data" / "cache", ignore_errors=True)
    return "staged cache removed"


DAMAGES: dict[str, tuple[float, Callable[[random.Random, Path], str | None]]] = {
    "checkpoint damaged": (0.35, damage_checkpoint),
    "latest damaged": (0.2, damage_latest),
    "log torn": (0.25, tear_log),
    "staged cache removed": (0.2, remove_staged_cache),
}


# Trouble for running processes


class Trouble(NamedTuple):
    """What was done to which ranks; `begun`: whether all ranks were past their start-up by then."""

    number: signal.Signals
    victims: list[int]
    begun: bool


def has_begun(launch: Launch) -> bool:
    return re.search(r": (resuming after step|fresh run in)", launch.text()) is not None


def is_alive(launch: Launch) -> bool:
    return all(process.poll() is None for process in launch.processes)


def wait(launch: Launch, seconds: float, condition: Callable[[], bool] = lambda: False) -> None:
    """Returns after `seconds`, when `condition` holds or when a process has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and is_alive(launch) and not condition():
        time.sleep(0.01)


def wait_for_moment(rng: random.Random, launch: Launch, start_up: float) -> str:
    """Waits for a random moment and says of which kind; a start-up takes `start_up` seconds."""
    moment = rng.choices(["start-up", "training", "save", "end of a stage"], [3, 4, 4, 1])[0]
    if moment == "start-up":
        wait(launch, rng.uniform(0, start_up))
        return moment
    wait(launch, LIMIT, lambda: has_begun(launch))
    if moment == "end of a stage":
        end = next((step for step in (120, 240) if step > launch.last_step()), 480)
        wait(launch, 20, lambda: launch.last_step() >= end - 1)
        wait(launch, rng.uniform(0, 0.5))
    else:
        wait(launch, rng.uniform(0, 5))
    if moment == "save":
        checkpoints = launch.run_dir / "checkpoints"
        before = set(checkpoints.glob("*.tmp"))
        wait(launch, 10, lambda: not before.issuperset(checkpoints.glob("*.tmp")))
        wait(launch, rng.uniform(0, 0.03))
    return moment


def kill(rng: random.Random, launch: Launch) -> Trouble:
    everyone = list(range(launch.world_size))
    return _send(launch, signal.SIGKILL, rng.choice([[rng.choice(everyone)], everyone]))


def suspend_and_kill(rng: random.Random, launch: Launch) -> Trouble:
    rank = rng.randrange(launch.world_size)
    _send(launch, signal.SIGSTOP, [rank])
    wait(launch, rng.uniform(0, 3))
    return _send(launch, signal.SIGKILL, [rank])


def ask_to_stop(rng: random.Random, launch: Launch) -> Trouble:
    """SIGTERM or SIGUSR1 to one process, and perhaps another signal to any a moment later."""
    first = _send(launch, rng.choice(SIGNALS), [rng.randrange(launch.world_size)])
    if rng.random() < 0.5:
        return first
    time.sleep(rng.uniform(0, 2))
    second = _send(launch, rng.choice(SIGNALS), [rng.randrange(launch.world_size)])
    return Trouble(second.number, first.victims + second.victims, first.begun)


def _send(launch: Launch, number: signal.Signals, ranks: list[int]) -> Trouble:
    trouble = Trouble(number, ranks, has_begun(launch))
    for rank in ranks:
        launch.send(rank, number)
    return trouble


TROUBLES: dict[str, tuple[float, Callable[[random.Random, Launch], Trouble]]] = {
    "kill -9": (4, kill),
    "suspended, then kill -9": (1.5, suspend_and_kill),
    "SIGTERM or SIGUSR1": (4, ask_to_stop),
}


# What is promised


def exit_codes(launch: Launch, patience: float) -> list[int | None]:
    """Waits for all; ranks left `patience` seconds after another has failed are ended by us, their launcher: None."""
    printed, heard, failed = 0, time.monotonic(), None
    while None in (codes := [process.poll() for process in launch.processes]):
        now = time.monotonic()
        if (size := launch.output.stat().st_size) > printed:
            printed, heard = size, now
        require(now - heard < LIMIT, f"no start hangs for {LIMIT} s", f"{codes}:\n{launch.text()[-3000:]}")
        if failed is None and any(code not in (None, 0, PREEMPTED) for code in codes):
            failed = now
        if failed is not None and now - failed > patience:
            for process in launch.processes:
                process.kill()
            break
        time.sleep(0.02)
    return codes


def are_expected(codes: list[int | None], trouble: Trouble, ended: bool) -> bool:
    """Whether processes may end so; `ended`: the run has reached its last step."""
    if set(codes) == {0}:
        return ended
    if trouble.number in SIGNALS and set(codes) == {PREEMPTED}:
        return True
    if trouble.number in SIGNALS and trouble.begun and not ended:
        return False
    bystander = {1, *([0] if ended else []), *([] if trouble.begun else [None])}
    victim = bystander | {-number for number in ([trouble.number] if trouble.number == signal.SIGKILL else SIGNALS)}
    fell = any(code is not None and code < 0 for code in codes)
    return fell and all(c in (victim if rank in trouble.victims else bystander) for rank, c in enumerate(codes))


def require_resumed_from(text: str, steps: list[int]) -> bool:
    """Whether a start came so far as to say what it goes on from, which must be the newest of `steps`."""
    said = re.search(r": (?:resuming after step (\d+)|already trained to its last step, (\d+)|fresh run in)", text)
    if said:
        found, expected = next((int(s) for s in said.groups() if s), 0), max(steps, default=0)
        promise = f"a start goes on from the newest complete checkpoint, that of step {expected}"
        require(found == expected, promise, f"found: {said.group()[2:]}\n{text[:3000]}")
    return said is not None


def require_equal(promise: str, found: list, expected: list) -> None:
    first = next((pair for pair in zip_longest(found, expected) if pair[0] != pair[1]), None)
    require(first is None, promise, f"first difference, found and expected: {first}")


def require_same_ending(run_dir: Path, twin: Path, exactly: bool) -> None:
    logs = [(folder / "sample_log.jsonl").read_text().splitlines() for folder in (run_dir, twin)]
    require_equal("sample_log.jsonl is that of the undisturbed run", *logs)
    steps = [json.loads(line)["step"] for line in logs[0]]
    require_equal("every step is taken exactly once", steps, list(range(1, len(steps) + 1)))
    leftovers = [*run_dir.rglob("*.tmp"), *run_dir.glob("stalled.txt")]
    require(not leftovers, "a finished run leaves no temporary files and has not stalled", leftovers)
    found, expected = outcome_of(run_dir), outcome_of(twin)
    require(found.state["step"] == len(steps), "the last step has a complete checkpoint", found.state["step"])
    if exactly:
        require_equal("metrics are those of the undisturbed run", found.metrics, expected.metrics)
        require(found.state.keys() == expected.state.keys(), "the same state is saved", found.state.keys())
        names = [name for name, tensor in expected.state.items() if not torch.equal(found.state[name], tensor)]
        require(not names, "weights, moments and averages are equal bit for bit", names)
        return
    losses = [torch.tensor([m["loss"] for m in o.metrics if m["event"] == "train"]) for o in (found, expected)]
    worst = float(((losses[0] - losses[1]) / losses[1]).abs().max())
    require(worst < 1e-4, "losses agree within 1e-4", worst)
    for name, tensor in expected.state.items():
        if name.startswith(("master/", "ema/")):
            distance = float((found.state[name] - tensor).norm() / tensor.norm())
            require(distance < 1e-3, "weights and averages agree within 1e-3", f"{name}: {distance}")


# The script


class Chaos:
    """Runs under trouble in `folder`, one after the other until the minutes are over; `tally` counts what was done."""

    def __init__(self, folder: Path, minutes: float, seed: int, zero: int | None, constant_world: bool):
        self.folder, self.zero, self.constant_world = folder, zero or (2 if constant_world else None), constant_world
        self.rng, self.tally, self.start_up = random.Random(seed), Counter(), 0.0
        self.until = time.monotonic() + 60 * minutes
        self._log = open(folder / "chaos.log", "a", buffering=1)  # noqa: SIM115 - open as long as we live

    def run(self) -> None:
        while not self.tally["runs"] or time.monotonic() < self.until:
            number = self.tally["runs"]
            twin = self._config(f"undisturbed-{number}", number, self.zero or 2)
            self.say(f"run {number}: first undisturbed")
            self._run_undisturbed(twin)
            run_dir = self._config(f"run-{number}", number, 2).directory
            while not self._start(run_dir, number):
                pass
            require_same_ending(run_dir, twin.directory, exactly=self.constant_world)
            self.say(f"run {number}: ended like the undisturbed one")
            self.tally["runs"] += 1

    def _run_undisturbed(self, config: RunConfig) -> None:
        began = time.monotonic()
        with Launch(config, forked=False) as launch:
            wait(launch, LIMIT, lambda: has_begun(launch))
            self.start_up = time.monotonic() - began
            codes = exit_codes(launch, patience=60)
            require(codes == [0, 0], "an undisturbed run ends with exit code 0", f"{codes}:\n{launch.text()[-3000:]}")

    def say(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')}.{time.time() % 1 * 1000:03.0f} {text}"
        print(line, flush=True)
        self._log.write(line + "\n")

    def _config(self, name: str, seed: int, zero: int, **checkpoint: int) -> RunConfig:
        data = shards_in(self.folder / "data")
        sections = {**KEYS, "seed": seed, "deepspeed": {"config": f"zero{zero}"}, "checkpoint": checkpoint}
        return tiny_config(data, self.folder / name, **sections)

    def _start(self, run_dir: Path, number: int) -> bool:
        """One start with trouble, or without once the time is up; whether the run is at its end."""
        rng, disturbed = self.rng, time.monotonic() < self.until
        if disturbed:
            self._damage(run_dir)
        world_size = 2 if self.constant_world or not disturbed else rng.choices([1, 2, 4], [4, 5, 1])[0]
        keys = {"every": rng.randint(3, 30), "keep_last": rng.randint(1, 3), "asynchronous": rng.random() < 0.4}
        config = self._config(run_dir.name, number, self.zero or rng.choice([1, 2, 3]), **keys)
        steps, before = resumable(run_dir), last_step(run_dir)
        self.say(f"start: {world_size} processes, {config.deepspeed.config}, {keys}, checkpoints {steps}")
        self.tally["starts"] += 1
        self.tally[f"starts of {world_size} processes"] += 1
        with Launch(config, world_size, forked=False) as launch:
            trouble = self._trouble(launch, config) if disturbed else Trouble(signal.SIGKILL, [], True)
            codes = exit_codes(launch, patience=60 if trouble.begun else 5)
            text = launch.text()
        metrics = run_dir / "metrics.jsonl"
        ended = metrics.is_file() and '\n{"event": "end"' in metrics.read_text()
        self.say(f"exit codes {codes}, {last_step(run_dir)} steps done{', the last one' if ended else ''}")
        self.tally.update("ended by the launcher" if code is None else f"exit code {code}" for code in codes)
        if require_resumed_from(text, steps):
            self.tally["steps lost"] += before - max(steps, default=0)
        require(are_expected(codes, trouble, ended), f"{trouble} has its exit codes", f"{codes}:\n{text[-5000:]}")
        return set(codes) == {0}

    def _damage(self, run_dir: Path) -> None:
        for name, (probability, damage) in DAMAGES.items():
            if self.rng.random() < probability and (done := damage(self.rng, run_dir)):
                self.tally[name] += 1
                self.say(f"damage: {done}")

    def _trouble(self, launch: Launch, config: RunConfig) -> Trouble:
        if self.rng.random() < 0.12:
            self._require_second_start_refused(launch, config)
        moment = wait_for_moment(self.rng, launch, self.start_up)
        name = self.rng.choices(list(TROUBLES), [weight for weight, _ in TROUBLES.values()])[0]
        self.tally[name] += 1
        trouble = TROUBLES[name][1](self.rng, launch)
        self.say(f"{name} in {moment}: {trouble}, step {launch.last_step()}")
        return trouble

    def _require_second_start_refused(self, launch: Launch, config: RunConfig) -> None:
        """A second start beside `launch` ends with exit code 2 and leaves it alone."""
        wait(launch, LIMIT, lambda: has_begun(launch))
        self.say("a second start on the same folder")
        with Launch(config, 1, output=self.folder / "second.out", forked=False) as second:
            codes, text = second.exit_codes(LIMIT), second.text()
        if is_alive(launch) and "already trained to its last step" not in text:  # else it was about to end
            refused = codes == [2] and "another run trains in this folder" in text
            require(refused, "a second start is refused with exit code 2", f"{codes}:\n{text}")
            self.tally["second starts refused"] += 1
        else:
            require(codes[0] in (0, 2), "a second start finds the first one ended", f"{codes}:\n{text}")

    def table(self) -> str:
        return "\n".join(f"{count:6}  {name}" for name, count in sorted(self.tally.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="after these the current run may end in peace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), help="one ZeRO stage for all starts")
    parser.add_argument("--constant-world", action="store_true", help="two processes at every start")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in this new folder and leave it there")
    options = parser.parse_args()
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # through all `with`, so nothing is left; also where SIGINT is ignored
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    folder = options.keep or Path(tempfile.mkdtemp(prefix="npp-chaos-"))
    folder.mkdir(parents=True, exist_ok=options.keep is None)
    chaos = Chaos(folder, options.minutes, options.seed, options.zero, options.constant_world)
    try:
        chaos.run()
    except AssertionError as broken:
        chaos.say(f"BROKEN PROMISE: {broken}")
        print(f"{chaos.table()}\nthe folder stays for study: {folder}")
        return 1
    print(chaos.table())
    if options.keep is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
