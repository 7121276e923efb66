"""Make the report of runs from the files in their folders: a plot, an HTML page and the closing tables."""

import io
from collections.abc import Sequence
from pathlib import Path

from npp_ds.errors import UserError
from npp_ds.reporting.page import Picture, page, picture
from npp_ds.reporting.plot import plot_run
from npp_ds.reporting.run_data import PAGE_FILE, PLOT_FILE, RunData, read_run
from npp_ds.reporting.summary import RunSummary, print_summary, summarize
from npp_ds.sampling.folder import tiled
from npp_ds.utils.files import check_writable, explain_os_errors, write_atomic, write_text_atomic
from npp_ds.utils.format import counted

COMPARISON_FILE = "comparison.html"
SHOWN_SIDES, SHOWN_IMAGES, SHOWN_PER_ROW = (8, 4, 2, 1), 4, 2


def report_runs(
    run_dirs: Sequence[str | Path],
    *,
    out: Path | None = None,
    next_steps: Sequence[str] = (),
    show: bool = True,
) -> list[RunSummary]:
    """Write the page of one run, or one page that compares several; print closing tables if `show`.

    By default the page of one run is report.html in its folder, which gets training.png as well, and that of several
    is comparison.html in the folder that holds the first run. Only `out` is written if it is given. Runs may be
    unfinished. Raises UserError if a folder is not a run or has no training line yet, or the page cannot be written.
    """
    runs = [read_run(run_dir) for run_dir in run_dirs]
    first = runs[0].folder
    path = check_writable(out or (first / PAGE_FILE if len(runs) == 1 else first.parent / COMPARISON_FILE))
    patches, reason = patch_pictures(runs)
    with explain_os_errors(path):
        if path == first / PAGE_FILE:
            plot = plot_run(runs[0].events, runs[0].schedule.stages, runs[0].config.name)
            write_atomic(first / PLOT_FILE, lambda file: file.write(plot))
        names = [run.config.name for run in runs]
        if len(set(names)) < len(names):
            names = [str(run.folder) for run in runs]
        summaries = [
            _summarize(run, name, path, next_steps if run is runs[-1] else ())
            for run, name in zip(runs, names, strict=True)
        ]
        write_text_atomic(path, page(runs, summaries, patches, reason, next_steps))
    if show:
        for summary in summaries:
            print_summary(summary)
    return summaries


def _summarize(run: RunData, name: str, path: Path, next_steps: Sequence[str]) -> RunSummary:
    return summarize(
        name,
        run.events,
        run.schedule.stages,
        **run.costs(),
        evaluation=run.evaluation,
        files=run.files(path),
        next_steps=next_steps,
    )


def patch_pictures(runs: Sequence[RunData]) -> tuple[list[Picture], str]:
    """Return pictures of images of the data whose codes are averaged in patches, one per patch side, coarse to fine.

    They are of the first run whose data and tokenizer are on this machine. Needs torch; the second value is why there
    are none.
    """
    reasons = []
    for run in runs:
        try:
            return _patch_pictures(run), ""
        except (UserError, ImportError, OSError) as error:
            reasons.append(str(error))
    return [], reasons[0]


def _patch_pictures(run: RunData) -> list[Picture]:
    from npp_ds.tokenizer.contents import decode_patch_means, evenly_spaced_codes
    from npp_ds.tokenizer.loading import tokenizer_of

    data = run.config.data
    manifest, codes = evenly_spaced_codes(data.val or data.train, data.cache_dir, SHOWN_IMAGES)
    tokenizer = tokenizer_of(manifest.tokenizer, data.tokenizer)
    pictures = []
    for side in (side for side in SHOWN_SIDES if manifest.grid_size % side == 0):
        png, positions = io.BytesIO(), (manifest.grid_size // side) ** 2
        tiled(decode_patch_means(tokenizer, codes, side), SHOWN_PER_ROW).save(png, "PNG")
        codes_each = f"of {side * side} codes each" if side > 1 else "of one code each"
        what = f"patch side {side}: {counted(positions, 'position')} {codes_each}"
        pictures.append(picture(png.getvalue(), what, f"images of the data, {what}"))
    return pictures
