"""Train and measure the arms of `plan.yaml` on small natural images, and write the page of their results.

`--images` is a folder of 32x32 images with class folders under train/ and test/. Rerun the same command to resume:

    python -m studies.claim --images cifar10 --out study --part 1
    python -m studies.claim --images cifar10 --out study --part 2 --jobs 4
    python -m studies.claim --images cifar10 --out study --part muon
    python -m studies.claim --images cifar10 --out study --part data
    python -m studies.claim --images cifar10 --out study --part seconds    # on an idle machine
    python -m studies.claim --page docs/study.md
"""

import argparse
import os
import sys
from pathlib import Path

from npp_ds.cli.exit_codes import exit_code_of
from npp_ds.errors import UserError
from npp_ds.training.preemption import PREEMPTED, Preempted
from studies.claim.plan import DATA, MUON, PLAN, SECONDS, Plan  # without torch, which must not load before `main`

RESULTS = Path(__file__).parents[1] / "results" / "claim"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, help="folder with train/<class>/ and test/<class>/")
    add("--out", type=Path, help="folder for codes and run folders")
    add("--part", help="part of the plan to run; 'muon': compare an optimizer; 'seconds': measure seconds per step, on "
        "an idle machine; 'data': measure the test images as samples are")  # fmt: skip
    add("--jobs", type=int, default=2, help="runs at a time, with one thread each (%(default)s)")
    add("--run", help="make only the run of this name, in this process")
    add("--results", type=Path, default=RESULTS, help="folder of the results, a JSON file a run (%(default)s)")
    add("--plan", type=Path, default=PLAN, help="(%(default)s)")
    add("--page", type=Path, help="write the page of all results, and its plots beside it")
    return parser.parse_args()


def main() -> int:
    os.environ["OMP_NUM_THREADS"] = "1"
    options = parse()
    try:
        return exit_code_of(lambda: study(options))
    except Preempted:
        return PREEMPTED


def study(options: argparse.Namespace) -> None:
    plan = Plan(options.results, options.plan)
    if options.part or options.run:
        if not (options.images and options.out):
            raise UserError("--images and --out: found none, expected the folders of images and of runs")
        _run(plan, options)
    if options.page:
        from studies.claim.page import write_page

        write_page(plan, options.page)


def _run(plan: Plan, options: argparse.Namespace) -> None:
    from studies.claim.data import encode, measure_data
    from studies.claim.muon import measure_muon
    from studies.claim.runs import make_run, run_part
    from studies.claim.seconds import measure_seconds

    known = {run.name: run for part in plan.parts for run in plan.runs(part)}
    if options.run:
        if options.run not in known:
            raise UserError(f"--run: found {options.run}, expected one of {', '.join(known)}")
        make_run(plan, known[options.run], options.images, options.out)
        return
    if options.part not in (parts := [*map(str, plan.parts), MUON, SECONDS, DATA]):
        raise UserError(f"--part: found {options.part}, expected one of {', '.join(parts)}")
    encode(plan, options.images, options.out / "codes")
    if options.part == MUON:
        measure_muon(plan, options.out, options.jobs)
        return
    if options.part == SECONDS:
        measure_seconds(plan, options.out)
        return
    if options.part == DATA:
        measure_data(plan, options.images, options.out)
        return
    paths = {name: str(getattr(options, name).resolve()) for name in ("images", "out", "results", "plan")}
    arguments = [word for name, value in paths.items() for word in (f"--{name}", value)]
    run_part(plan, int(options.part), arguments, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
