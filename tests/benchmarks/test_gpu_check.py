"""`benchmarks.gpu_check`: a part that fails, hangs or is killed costs no other its result, and all fit two calls."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import CORRECTNESS, FIGURE, FIRST_CALL, OVERHEAD, PARTS, SECOND_CALL, TOGETHER, Part
from benchmarks.gpu_table import summary, table

ROOT = Path(__file__).parents[2]
FACTS = {"device": "NVIDIA H200", "versions": {"torch": "2.11.0", "flash-attn": None}, "dry": False}


def a_part(name: str, code: str, kind: str = FIGURE, limit: int = 60) -> Part:
    return Part(name, kind, limit, ("-c", code))


def prints(result: dict, first: str = "") -> str:
    return f"{first}\nprint({json.dumps(json.dumps(result))})"


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run a call of the check over a table of parts: (exit code, results, what was printed)."""
    monkeypatch.setattr(gpu_check, "machine_of", lambda dry: FACTS)
    monkeypatch.setattr(gpu_check, "install_wheels", lambda: None)

    def run(parts: list[Part], *options: str) -> tuple[int, dict, str]:
        monkeypatch.setattr(gpu_check, "PARTS", tuple(parts))
        with pytest.raises(SystemExit) as ended:
            gpu_check.main(["--results", str(tmp_path), "--commit", "abc", *options])
        content = json.loads((tmp_path / "gpu_h200.json").read_text())
        assert {key: content[key] for key in FACTS} == FACTS
        return int(ended.value.code), content["parts"], capsys.readouterr().out

    return run


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "zombie" not in status.read_text()


def wait_until(holds, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_part_that_fails_or_hangs_costs_no_other_part_and_a_second_call_runs_only_what_is_missing(call, tmp_path):
    counted, child = tmp_path / "counted", tmp_path / "child"
    good = a_part("good", prints({"x": 1}, f"open({str(counted)!r}, 'a').write('.')"), CORRECTNESS)
    hangs = (
        "import subprocess, time; child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid)); print('began'); child.wait()"
    )
    parts = [
        good,
        a_part("broken", "raise SystemExit('no such luck')", CORRECTNESS),
        a_part("silent", "pass"),
        a_part("hangs", hangs, limit=1),
        a_part("figure", prints({"ratios": {"speed": 3.0}, "wanted": {"speed": 2.0}})),
    ]
    code, found, printed = call(parts, "--out", str(tmp_path / "out"))
    assert code == 1
    assert {name: entry["status"] for name, entry in found.items()} == {
        "good": "passed", "broken": "failed", "silent": "failed", "hangs": "timed out", "figure": "passed",
    }  # fmt: skip
    assert found["good"]["result"] == {"x": 1} and found["good"]["commit"] == "abc"
    assert "no such luck" in found["broken"]["output"] and "began" in found["hangs"]["output"]
    assert "output" not in found["good"]
    wait_until(lambda: not is_running(int(child.read_text())))
    assert "| speed | 3 | 2 | met |" in printed and "flash-attn is not installed" in printed
    assert json.loads((tmp_path / "out/gpu_h200.json").read_text())["parts"] == found
    assert "no such luck" in (tmp_path / "out/gpu_h200.log").read_text()

    fixed = [good, *(a_part(part.name, prints({})) for part in parts[1:])]
    code, found, _ = call(fixed)
    assert code == 0 and {entry["status"] for entry in found.values()} == {"passed"}
    assert found["figure"]["result"]["ratios"] == {"speed": 3.0}, "a part that passed runs once"
    assert counted.read_text() == "."
    call(fixed, "--only", "good")
    assert counted.read_text() == ".."


def test_the_end_of_a_call_cuts_a_part_off_and_the_next_call_runs_it_before_failed_ones(call):
    parts = [a_part("broken", "raise SystemExit(1)", limit=1), a_part("slow", "import time; time.sleep(60)", limit=4)]
    code, found, _ = call(parts, "--limit", "3")
    assert code == 1 and {name: entry["status"] for name, entry in found.items()} == {
        "broken": "failed", "slow": "cut off",
    }  # fmt: skip
    again = [parts[0], replace(parts[1], command=("-c", prints({})))]
    _, _, printed = call(again)
    assert printed.index("slow: passed") < printed.index("broken: failed")


def test_a_call_that_is_terminated_ends_its_parts_and_leaves_whole_results(tmp_path):
    pid = tmp_path / "pid"
    stays = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parts = f"g.Part('first', 'figure', 60, ('-c', 'print({{}})')), g.Part('stays', 'figure', 60, ('-c', {stays!r}))"
    program = (
        "from benchmarks import gpu_check as g\n"
        f"g.machine_of, g.install_wheels = lambda dry: {FACTS!r}, lambda: None\n"
        f"g.PARTS = ({parts})\n"
        f"g.main(['--results', {str(tmp_path)!r}])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    call = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: pid.is_file() and pid.read_text())
        call.send_signal(signal.SIGTERM)
        assert call.wait(20) == 143
        wait_until(lambda: not is_running(int(pid.read_text())))
    finally:
        call.kill()
        call.wait()
        if pid.is_file() and is_running(int(pid.read_text())):
            os.kill(int(pid.read_text()), signal.SIGKILL)
    parts = json.loads((tmp_path / "gpu_h200.json").read_text())["parts"]
    assert {name: entry["status"] for name, entry in parts.items()} == {"first": "passed"}


def test_tests_that_were_all_skipped_have_shown_nothing(call, tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text("import pytest\n@pytest.mark.skip\ndef test_gpu(): pass\n\ndef test_other(): pass\n")
    parts = [
        Part(name, CORRECTNESS, 60, ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), "-k", selected))
        for name, selected in (("skipped", "gpu"), ("passed", "gpu or other"))
    ]
    _, found, _ = call(parts)
    assert found["skipped"] == {**found["skipped"], "status": "failed", "result": {"skipped": 1}}
    assert found["passed"] == {**found["passed"], "status": "passed", "result": {"passed": 1, "skipped": 1}}


def test_all_parts_fit_two_calls_when_each_takes_as_long_as_its_limit():
    waiting = [part for part in PARTS if part.kind == FIGURE]
    done: list[list[str]] = []
    for left in (FIRST_CALL - OVERHEAD - TOGETHER, SECOND_CALL - OVERHEAD):
        done.append([])
        while (part := gpu_check.next_part(waiting, left)) and part.limit <= left:
            waiting.remove(part)
            done[-1].append(part.name)
            left -= part.limit
    assert not waiting
    assert done[0][:3] == ["steps B", "crops", "sampling B"], "the most valuable figures come first"
    assert all(part.limit == TOGETHER for part in PARTS if part.kind == CORRECTNESS)


def test_only_wheels_that_are_missing_or_older_are_installed(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: ran.append(command) or subprocess.CompletedProcess(command, 0)
    )
    for wheel in (f"pytest-{version('pytest')}", "numpy-0.1", "pyyaml-99.0", "nosuch-1"):
        (tmp_path / f"{wheel}-py3-none-any.whl").touch()
    gpu_check.install_wheels(tmp_path)
    assert [Path(word).name for word in ran[0] if word.endswith(".whl")] == [
        "nosuch-1-py3-none-any.whl", "pyyaml-99.0-py3-none-any.whl",
    ]  # fmt: skip
    assert "--no-index" in ran[0]
    gpu_check.install_wheels(tmp_path / "none")
    assert len(ran) == 1


def test_wrong_use_is_one_clear_error(capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--only", "nonsense"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("--only nonsense: no such part; there are patch loss, ")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "PyTorch finds no CUDA device on this machine; run it where there is one, or try --dry\n"


@pytest.mark.slow
@pytest.mark.processes
def test_every_part_starts_and_ends_in_a_dry_run(tmp_path):
    """All parts; tests for a GPU are collected and skipped."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "gpu_dry.json").read_text())
    assert list(content["parts"]) and set(content["parts"]) == {part.name for part in PARTS}
    assert content["versions"]["torch"] == version("torch") and content["device"] is None
    for part in PARTS:
        if "pytest" in part.command:
            assert content["parts"][part.name]["result"]["skipped"] > 0
    steps = content["parts"]["steps B"]["result"]
    seconds = {row["patch_side"]: row["seconds"] for row in steps["cases"]}
    schedule = steps["schedule"]
    assert sum(schedule["steps"].values()) == 300 * (1_281_167 // 256)
    hours = sum(seconds[int(side)] * count for side, count in schedule["steps"].items()) / 3600
    assert schedule["share"] == pytest.approx(hours / schedule["next_token_hours"])
    printed = summary(content, PARTS)
    assert "attention kernels           passed" in printed and "required" not in printed
    text = table(content)
    assert "| small | 8 | engine eager | 16 |" in text and "shipped tokenizer: fp32 100.00%" in text
