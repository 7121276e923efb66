"""The documentation site builds: every page is in its navigation, and every link leads to a file and an anchor."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from npp_ds.cli import app
from npp_ds.cli.exit_codes import FAILED, NON_FINITE, USER_ERROR
from npp_ds.config.checks import problems_of
from npp_ds.config.fields import keys_of
from npp_ds.config.load import load_config
from npp_ds.config.schema import RunConfig
from npp_ds.data.manifest import Manifest
from npp_ds.data.shards import verify
from npp_ds.training.preemption import PREEMPTED
from npp_ds.training.watchdog import STALLED

ROOT = Path(__file__).parents[2]
HOOK = "docs/mkdocs_hook.py"

pytest.importorskip("mkdocs")


def build(root: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)


def test_the_site_builds_without_a_warning(tmp_path):
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.parent.name for path in tmp_path.glob("*/index.html")} == {p.stem for p in ROOT.glob("docs/*.md")}
    assert (tmp_path / "index.html").is_file() and not list(tmp_path.glob("*.py"))


@pytest.mark.parametrize(
    "text, nav, complaint",
    [
        ("[a](other.md)", "index.md, page.md", "contains a link 'other.md'"),
        ("[a](index.md#nowhere)", "index.md, page.md", "does not contain an anchor '#nowhere'"),
        ("[a](../nowhere.py)", "index.md, page.md", "links to ../nowhere.py, which does not exist"),
        ("text", "index.md", 'not included in the "nav" configuration:\n  - page.md'),
        ("[a](../README.md) [b](index.md#pitch)", "index.md, page.md", None),
    ],
)
def test_a_link_that_leads_nowhere_and_an_unlisted_page_end_the_build(tmp_path, text, nav, complaint):
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / HOOK, tmp_path / HOOK)
    (tmp_path / "README.md").write_text("# Title\n\n## Pitch\n\n[hook](docs/mkdocs_hook.py)\n")
    (tmp_path / "docs/page.md").write_text(f"# Page\n\n{text}\n")
    config = (ROOT / "mkdocs.yml").read_text().split("nav:\n  - ")[0]
    (tmp_path / "mkdocs.yml").write_text(f"{config}nav: [{nav}]\n")
    done = build(tmp_path, tmp_path / "site")
    assert (done.returncode != 0 and complaint in done.stderr) if complaint else done.returncode == 0, done.stderr


def code_texts() -> list[str]:
    """The literal parts of all texts in the code."""
    trees = [ast.parse(path.read_text()) for path in [*ROOT.glob("npp_ds/**/*.py"), *ROOT.glob("data_prep/*.py")]]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_troubleshooting_quotes_messages_that_the_code_has_and_names_every_exit_code():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    tables = page.split("## Speed")[0] + page.split("## Several processes")[1].split("## Exit codes")[0]
    symptoms = [line.split(" | ")[0] for line in tables.splitlines() if line.startswith("| ")]
    quoted = [text for symptom in symptoms for text in re.findall("`([^`]+)`", symptom)]
    known = "\0".join([*code_texts(), "Killed", "data_wait_share"])
    assert len(quoted) > 40 and not [text for text in quoted if text not in known]
    codes = {str(code) for code in (FAILED, USER_ERROR, NON_FINITE, PREEMPTED, STALLED)}
    assert codes <= set(re.findall(r"^\| (\d+)", page.split("## Exit codes")[1], re.MULTILINE))


PUBLISHED = {  # the flags of LlamaGen at commit 5a50452 and of NPP at 52db9c8
    "Extraction": "data-path code-path vq-model vq-ckpt codebook-size codebook-embed-dim dataset image-size ten-crop "
    "crop-range global-seed num-workers debug",
    "Training": "code-path cloud-save-path no-local-save gpt-model gpt-ckpt gpt-resume gpt-type vocab-size ema "
    "cls-token-num dropout-p token-dropout-p drop-path-rate no-compile results-dir dataset image-size downsample-size "
    "num-classes epochs lr weight-decay beta1 beta2 max-grad-norm global-batch-size global-seed num-workers log-every "
    "ckpt-every gradient-accumulation-steps mixed-precision data-parallel grad-precision wandb-project no-wandb "
    "epoch-rate patch-level rescale-rope scheduler decay-ratio end-lr warmup-epochs",
    "Sampling": "gpt-model gpt-ckpt gpt-type from-fsdp cls-token-num precision compile vq-model vq-ckpt codebook-size "
    "codebook-embed-dim image-size image-size-eval downsample-size num-classes cfg-scale cfg-interval sample-dir "
    "per-proc-batch-size num-fid-samples global-seed top-k temperature top-p",
}


def test_every_flag_of_the_published_scripts_has_a_counterpart_that_exists():
    page = (ROOT / "docs/coming-from-llamagen.md").read_text()
    tables = {name: page.split(f"## {name}: flag by flag")[1].split("\n## ")[0] for name in PUBLISHED}
    for name, flags in PUBLISHED.items():
        theirs = [line.split(" | ")[0] for line in tables[name].splitlines() if line.startswith("| ")]
        assert not set(flags.split()) - set(re.findall(r"--([a-z0-9-]+)", " ".join(theirs))), name

    def ours(name: str) -> str:
        return " ".join(line.split(" | ")[1] for line in tables[name].splitlines() if line.startswith("| "))

    def flags_of(text: str) -> set[str]:
        return set(re.findall(r"--[a-z-]+", text))

    parser = (ROOT / "data_prep/tokenize_imagenet.py").read_text()
    assert not [flag for flag in flags_of(ours("Extraction")) if f'"{flag}"' not in parser]
    options = {option for parameter in get_command(app).commands["sample"].params for option in parameter.opts}
    assert flags_of(ours("Sampling")) <= options
    keys = re.findall(r"\b[a-z]+\.[a-z_]+\b", ours("Training"))
    assert len(keys) > 25 and not set(keys) - {key for key, _ in keys_of(RunConfig)}
    load_config(
        "b_256", overrides=re.findall(r"`([a-z]+\.[a-z_]+=[^`]+)`", ours("Training").replace("=[wandb]", "=[]"))
    )


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_recipe_and_the_schedule_of_the_page_on_extending_are_valid(tmp_path):
    recipe, schedule = (yaml.safe_load(block) for block in blocks("docs/extending.md", "yaml"))
    for keys, sides in ((recipe, [8, 4, 2, 1]), ({"extends": "b_256", **schedule}, [4, 2, 1])):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(keys))
        config = load_config(file=tmp_path / "mine.yaml", world_size=8)
        assert not problems_of(config, 8, 1_281_167)
        assert [stage.patch_side for stage in config.build_schedule(1_281_167, 8).stages] == sides


def test_codes_of_ones_own_become_a_set_that_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("docs/extending.md", "python")
    exec(compile(block, "extending.md", "exec"), {})
    assert verify("mine") == []
    keys = ["data.train=mine", "model.vocab_size=512", "model.grid_size=8", "model.num_classes=10"]
    config = load_config("b_256", overrides=keys)
    assert Manifest.load("mine").coding.grid_size == config.model.grid_size


def test_the_page_on_extending_names_files_that_exist_and_the_one_place_of_the_optimizer():
    page = (ROOT / "docs/extending.md").read_text()
    paths = re.findall(r"`((?:npp_ds|tests|ds_configs|docs)/[\w./]*)`", page)
    assert len(paths) > 12 and not [path for path in paths if not (ROOT / path).exists()]
    built_in = [p.name for p in ROOT.glob("npp_ds/training/*.py") if "torch.optim." in p.read_text()]
    assert built_in == ["engine.py"]
