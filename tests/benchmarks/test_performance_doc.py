"""The figures in docs/performance.md are those of the committed results."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
PAGE = (ROOT / "docs/performance.md").read_text().splitlines()


@pytest.mark.parametrize("name", ["training_step", "training_step_profile", "engine"])
def test_tables_are_those_of_the_results(name):
    rows = [line for line in (RESULTS / f"{name}.md").read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 5
    assert not [row for row in rows if row not in PAGE]


def patch_loss_rows() -> list[str]:
    rows = []
    for case in json.loads((RESULTS / "patch_loss.json").read_text())["cases"]:
        ours, published = case["ways"]["this software"], case["ways"]["published way"]
        times = f"{1e3 * ours['median']:,.0f} | {1e3 * published['median']:,.0f} | {published['time_ratio']:.2f}"
        memory = f"{ours['bytes'] / 1e6:,.0f} | {published['bytes'] / 1e6:,.0f} | {published['memory_ratio']:.1f}"
        rows.append(f"| {case['width']} | {case['k']} | {times} | {memory} |")
    return rows


def test_the_table_of_the_patch_loss_is_that_of_the_results():
    rows = patch_loss_rows()
    assert len(rows) == 8
    assert not [row for row in rows if row not in PAGE]


@pytest.mark.parametrize("name", ["patch_loss", "training_step", "engine"])
def test_every_bound_that_is_not_met_is_named_as_such(name):
    result = json.loads((RESULTS / f"{name}.json").read_text())
    missed = [ratio for ratio, wanted in result["wanted"].items() if result["ratios"][ratio] < wanted]
    page = "\n".join(PAGE)
    assert [ratio for ratio in missed if f"`{ratio}`" not in page] == []
