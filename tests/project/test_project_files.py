"""The files around the code parse, agree with each other, and name only what exists."""

import io
import os
import re
from email import message_from_string
from pathlib import Path

import pytest
import yaml

import npp_ds

ROOT = Path(__file__).parents[2]
PAPERS = {"https://arxiv.org/abs/2412.15321", "https://arxiv.org/abs/2406.06525"}
MAKEFILE = (ROOT / "Makefile").read_text()
LINT = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]


def read_yaml(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_installed_package_carries_its_licence_and_names_the_papers(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    distribution = setuptools.distutils.core.run_setup("setup.py", stop_after="config")
    text = io.StringIO()
    distribution.metadata.write_pkg_file(text)
    found = message_from_string(text.getvalue())
    assert "Apache-2.0" in (found["License"], found["License-Expression"])
    assert found.get_all("License-File") == ["LICENSE"]
    assert {line.split(", ")[1] for line in found.get_all("Project-URL")} == PAPERS
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


def test_the_citation_file_describes_this_version_and_the_papers():
    citation = read_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["message"] and citation["title"].startswith("npp_ds")
    assert citation["authors"] == [{"name": "The npp_ds contributors"}]
    assert (citation["version"], citation["license"]) == (npp_ds.__version__, "Apache-2.0")
    method, backbone = citation["references"]
    assert {method["url"], backbone["url"]} == PAPERS
    names = [f"{author['given-names']} {author['family-names']}" for author in method["authors"]]
    assert (names[0], names[-1], len(names)) == ("Yatian Pang", "Li Yuan", 11)


def test_the_changelog_has_the_sections_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (.+)$", text, re.MULTILINE)[0] == "[Unreleased]"
    known = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= known


def test_hooks_run_the_tools_of_make_lint_and_download_nothing():
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    commands = set()
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/")
        commands.add(hook["entry"].removeprefix(".venv/bin/").split(" --")[0])
    assert commands == {"ruff check", "ruff format", "mypy", "shellcheck"}
    assert all(re.search(rf"\$\(BIN\)/{command}\b", LINT) for command in commands)


def test_make_lint_and_the_hook_check_every_shell_script():
    folders = [ROOT / name for name in (".ci", "slurm", "data_prep", "studies", "benchmarks", "npp_ds")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    scripts = {path for path in files if path.suffix == ".sh" or re.match(rb"#!.*\bbash\b", path.read_bytes()[:40])}
    words = re.search(r"shellcheck (.+)", LINT)[1].split()
    assert scripts == {path for word in words for path in ROOT.glob(word)}
    (hook,) = [h for h in read_yaml(".pre-commit-config.yaml")["repos"][0]["hooks"] if h["id"] == "shellcheck"]
    assert all(re.search(hook["files"], path.relative_to(ROOT).as_posix()) for path in scripts)


def test_the_workflow_runs_the_script_of_the_ci():
    (job,) = read_yaml(".github/workflows/ci.yml")["jobs"].values()
    assert job["steps"][-1]["run"] == ".ci/run"
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert job["timeout-minutes"]


def test_the_contribution_guide_names_only_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for targets in re.findall(r"\bmake ((?:[a-z]+-?[a-z]*\b ?)+)[`\s]", text):
        for target in targets.split():
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
    paths = re.findall(r"`([\w./-]+/[\w./-]*)`", text) + re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert len(paths) > 15
    assert not [path for path in paths if not (ROOT / path).exists()]
