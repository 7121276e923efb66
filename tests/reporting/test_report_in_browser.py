"""Pages of real runs, in headless Chromium: no error, no request, nothing cut off, readable in both modes."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from evaluated_runs import config_of, images_to_evaluate_with
from npp_ds.reporting.report import report_runs
from runs import run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which .ci/run installs"),
]

MEASURE = (Path(__file__).parent / "measure_page.js").read_text()
DARK, LIGHT = 0, 1  # Chromium's preferredColorScheme


@pytest.fixture(scope="module")
def pages(pair, tmp_path_factory) -> dict[str, Path]:
    """The page of a run with two stages, and one that compares it with a run at side 1."""
    folder = images_to_evaluate_with(tmp_path_factory.mktemp("report"))
    data = {"val": str(folder / "train")}
    runs = [folder / "coarse-first", folder / "next-token"]
    for run_dir, sides in zip(runs, ([2, 1], [1]), strict=True):
        every = {"validation": {"every": 3}, "logging": {"every": 1}, "schedule": {"patch_sides": sides}, "data": data}
        pair.run(run, config_of(folder, run_dir, {"every": 6}, name=run_dir.name, **every))
    report_runs(runs[:1], next_steps=["npp sample <run>"])
    report_runs(runs)
    return {"one": runs[0] / "report.html", "two": folder / "comparison.html"}


def look_at(page: Path, width: int, scheme: int, folder: Path) -> dict:
    """What measure_page.js finds on a copy of the page in a window of this width."""
    copy = folder / "copy.html"
    text = page.read_text()
    assert text.count("<head>") == 1
    copy.write_text(text.replace("<head>", f"<head><script>{MEASURE}</script>"))
    frame = f'<iframe src="copy.html" style="width:{width}px;height:900px;border:0"></iframe>'
    (folder / "frame.html").write_text(f"<!doctype html><body style='margin:0'>{frame}")
    done = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
            "--allow-file-access-from-files", f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=1400,1000", "--virtual-time-budget=10000", "--enable-logging=stderr", "--dump-dom",
            (folder / "frame.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = re.search('<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.parametrize("width, scheme", [(390, LIGHT), (1280, DARK)])
@pytest.mark.parametrize("name", ["one", "two"])
def test_a_page_is_readable(pages, tmp_path, name, width, scheme):
    found = look_at(pages[name], width, scheme, tmp_path)
    assert (found["width"], found["dark"]) == (width, scheme == DARK)
    assert found["problems"] == [] and found["requests"] == []
    assert found["scroll_width"] <= width and found["cut_off"] == []
    assert found["texts"] > 100 and found["low_contrast"] == [] and found["faint_curves"] == []
    assert found["broken_images"] == 0 and found["images"] == {"one": 2 + 4, "two": 4 + 4}[name]
    assert found["panels"] == ["validation", "loss", "evaluation", "rate", "speed", "gradients"]
    assert found["empty_panels"] == []
    assert found["axes"] == ["step", "epoch", "TFLOPs", "seconds of training"]
    assert found["moved"], "curves are drawn anew for another axis"
    assert re.fullmatch(r"(.+: [\d.e,-]+ after step \d+(; )?)+", found["values"]), "arrow keys read values"
    assert found["pages"] > 3 and found["torn"] == [], "print keeps a figure with its heading"
    assert found["tips"] > 5 and found["bad_tips"] == [] and found["closed_by_escape"]
