"""The plan of the study (`plan.yaml`): its arms with what they choose from earlier results, and the config of a run."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from npp_ds.config.schedule import stage_ends
from npp_ds.config.schema import ModelSection, RunConfig
from npp_ds.errors import UserError
from npp_ds.sizes import num_positions
from npp_ds.utils.files import sha256

PLAN = Path(__file__).parent / "plan.yaml"
MUON, SECONDS, DATA = "muon", "seconds", "data"  # parts that the study has beside those of its plan
DROPOUT = ("token_dropout", "residual_dropout", "ffn_dropout")


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    part: int
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.part}-{self.arm}-seed{self.seed}"


class Plan:
    """The plan in a file, and the results in a folder, one JSON file a run.

    Parts that were added after the first run are in a file of their own, PLAN_added.yaml: results hold the SHA-256 of
    the file that has their part.
    """

    def __init__(self, results: Path, path: Path = PLAN):
        self.results, self.path = results, path
        self.keys: dict[str, Any] = yaml.safe_load(path.read_text())
        self.parts: dict[int, dict[str, Any]] = self.keys["parts"]
        self.sha256_of = dict.fromkeys(self.parts, sha256(path))
        if (added := path.with_name(f"{path.stem}_added.yaml")).is_file():
            later: dict[int, dict[str, Any]] = yaml.safe_load(added.read_text())["parts"]
            self.parts.update(later)
            self.sha256_of.update(dict.fromkeys(later, sha256(added)))
        data = self.keys["data"]
        self.tokenizer = path.parent / data["tokenizer"]
        self.classifier = path.parent / data["classifier"] if "classifier" in data else None
        self.part_of = {arm: number for number, part in self.parts.items() for arm in part["arms"]}

    @cached_property
    def _tokenizer_sha256(self) -> str | None:
        return sha256(self.tokenizer) if self.tokenizer.is_file() else None

    def runs(self, part: int) -> list[Run]:
        """Return the runs of a part: all arms with its first seed, then all with its second."""
        return [Run(part, arm, seed) for seed in self.parts[part]["seeds"] for arm in self.parts[part]["arms"]]

    def runs_of(self, arm: str) -> list[Run]:
        """Return the runs of an arm."""
        return [run for run in self.runs(self.part_of[arm]) if run.arm == arm]

    def file(self, run: Run) -> Path:
        """Return the path of a run's result."""
        return self.results / f"{run.name}.json"

    def result(self, run: Run) -> dict[str, Any] | None:
        """Return the result of a run, None if it has not finished. Raises UserError for a result of another plan."""
        path = self.file(run)
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text())
        if found["plan_sha256"] != self.sha256_of[run.part]:
            raise UserError(f"{path}: a result of another plan than the one here; choose other --results")
        if self._tokenizer_sha256 and found.get("tokenizer_sha256", self._tokenizer_sha256) != self._tokenizer_sha256:
            raise UserError(f"{path}: a result with another tokenizer than {self.tokenizer}; choose other --results")
        return found

    def recorded(self, name: str) -> dict[str, Any] | None:
        """Return the content of a JSON file beside the results, None before it is written."""
        path = self.results / name
        return json.loads(path.read_text()) if path.is_file() else None

    def judged_by(self, part: int) -> tuple[str, str]:
        """Return the key of the loss that decides in a part, and the images that it is of."""
        return ("test_nats", "test") if self.parts[part].get("test") else ("nats", "validation")

    def nats(self, arm: str) -> float | None:
        """Return the mean validation loss of an arm, None until all its runs have finished."""
        found = [self.result(run) for run in self.runs_of(arm)]
        return None if None in found else mean(result["nats"] for result in found if result)

    def chosen(self, arm: str) -> str | None:
        """Return the arm whose keys an arm takes: that with the lowest loss, None until it is known."""
        losses = {name: self.nats(name) for name in self._spec(arm).get("choose", ())}
        known = {name: loss for name, loss in losses.items() if loss is not None}
        return min(known, key=lambda name: known[name]) if len(known) == len(losses) and losses else None

    def _spec(self, arm: str) -> dict[str, Any]:
        return self.parts[self.part_of[arm]]["arms"][arm]

    def resolved(self, arm: str) -> dict[str, Any] | None:
        """Return the keys of an arm with those that it takes from others, None while these are not known."""
        spec = {key: value for key, value in self._spec(arm).items() if key != "choose"}
        if not self._spec(arm).get("choose"):
            return spec
        chosen = self.chosen(arm)
        taken = self.resolved(chosen) if chosen else None
        return None if taken is None else {**taken, **spec}

    def stages(self, arm: str) -> list[dict[str, Any]] | None:
        """Return the stages of an arm as the config lists them, None while `resolved` is."""
        spec = self.resolved(arm)
        if spec is None:
            return None
        stages = self._planned_stages(spec)
        if (other := spec.get("updates_of")) is None:
            return stages
        model = self.stages(other)
        if model is None:
            return None
        updates, images = sum(s["steps"] for s in model), sum(s["steps"] * s["batch_size"] for s in stages)
        return [{**stages[0], "steps": updates, "batch_size": max(1, round(images / updates))}]

    def _planned_stages(self, spec: dict[str, Any]) -> list[dict[str, Any]]:
        t, images = self.keys["training"], self.keys["data"]["train"]
        sides, epochs = spec.get("sides", [1]), spec.get("epochs", t["epochs"])
        ends = [0, *stage_ends(epochs, len(sides), t["ratio"])]
        shares = spec.get("shares") or [(end - start) / epochs for start, end in pairwise(ends)]
        factor = 1.0
        if spec.get("flops") is not None:
            per_epoch = self.flops_per_image(1)
            factor = spec["flops"] * per_epoch / sum(
                share * self.flops_per_image(side) for share, side in zip(shares, sides, strict=True)
            )  # fmt: skip
        stages = []
        for index, (side, share) in enumerate(zip(sides, shares, strict=True)):
            batch = spec["batch"] * (side * side if spec.get("coarse_batch") else 1)
            peak = spec["peak"] * spec.get("peaks", [1.0] * len(sides))[index]
            stage = {
                "patch_side": side,
                "steps": max(1, round(share * epochs * factor * images / batch)),
                "batch_size": batch,
                "learning_rate": peak,
                "final_learning_rate": peak * t["final_rate"],
                "warmup_epochs": t["warmup_epochs"],
                "decay_fraction": t["decay_fraction"],
            }
            if spec.get("one_schedule"):
                stage |= {"warmup_epochs": 0.0} if index else {}
                stage |= {"decay_fraction": 0.0} if index + 1 < len(sides) else {}
            if side > 1 and "coarse_dropout" in spec:
                stage["dropout_scale"] = spec["coarse_dropout"]
            stages.append(stage)
        return stages

    def flops_per_image(self, side: int) -> int:
        """Return the FLOPs of training on one image at a patch side."""
        model = ModelSection(**self.keys["model"])
        return model.training_flops(num_positions(model.grid_size, side))

    def flops(self, stages: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
        """Yield (steps, FLOPs) at the end of each stage."""
        steps = flops = 0
        for stage in stages:
            steps += stage["steps"]
            flops += stage["steps"] * stage["batch_size"] * self.flops_per_image(stage["patch_side"])
            yield steps, flops

    def config(self, run: Run, codes: Path, run_dir: Path) -> RunConfig | None:
        """Return the config of a run, None while what it chooses from is not finished."""
        spec, stages = self.resolved(run.arm), self.stages(run.arm)
        if spec is None or stages is None:
            return None
        rate = spec.get("dropout", self.keys["training"]["dropout"])
        steps = sum(stage["steps"] for stage in stages)
        return RunConfig.model_validate(
            {
                "name": run.name,
                "run_dir": str(run_dir),
                "seed": run.seed,
                "precision": self.keys["training"].get("precision", "fp32"),
                "model": {
                    **self.keys["model"],
                    **dict.fromkeys(DROPOUT, rate),
                    "coarse_positions": spec.get("positions", "paper"),
                },
                "data": {
                    "train": str(codes / "train"),
                    "val": str(codes / "validation"),
                    "cache_dir": str(codes / "cache"),
                },
                "schedule": {"stages": stages, "end_at_patch_side_one": stages[-1]["patch_side"] == 1},
                "validation": {"every": max(1, steps // 8), "batch_size": 250},
                "checkpoint": {"every": max(1, steps // 10), "keep_last": 1},
                "logging": {"every": max(1, min(50, steps // 10))},
                "watch": {"stall_seconds": 0},
            }
        )
