"""`npp` says what it can do: help with an example for every command, recipes, version, completion."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

import npp_ds
from npp_ds.cli import app
from npp_ds.config.load import load_config, recipe_names
from npp_ds.config.schema import RunConfig
from npp_ds.errors import UserError

ROOT = get_command(app)


def all_commands(group=ROOT, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    found = {path: group}
    for name, command in getattr(group, "commands", {}).items():
        found |= all_commands(command, (*path, name))
    return found


def parse(words: list[str]) -> tuple[str, ...]:
    """Parse a command line as `npp` does, without running it; return the names of its command."""
    command, context, path = ROOT, None, ()
    while words and words[0] in getattr(command, "commands", {}):
        command, path, words = command.commands[words[0]], (*path, words[0]), words[1:]
    if not getattr(command, "commands", {}):
        context = command.make_context(path[-1], list(words))
        for override in context.params.get("overrides") or ():
            load_config(context.params["recipe"], overrides=[override])
    return path


@pytest.mark.parametrize("path", all_commands(), ids=" ".join)
def test_every_help_has_an_example_that_parses(path):
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"}).output
    (example,) = re.findall(r"Example: npp (.+?)\s*$", shown, re.MULTILINE)
    named = parse(shlex.split(example))
    assert named == path if path and path != ("shards",) else len(named) > len(path)


def test_recipes_are_listed_in_one_line_each_that_fits_80_columns():
    shown = CliRunner().invoke(app, ["recipes"]).output.splitlines()
    assert [line.split()[0] for line in shown] == recipe_names()
    assert max(map(len, shown)) <= 80
    (xl,) = [line for line in shown if line.startswith("xl_256")]
    assert xl.split() == ["xl_256", "775M", "2,1", "300", "epochs", "paper_256", "with", "model.size=XL"]
    assert "next-token" in next(line for line in shown if line.startswith("ntp_256"))


def test_a_shown_recipe_is_a_config_file(tmp_path):
    shown = CliRunner().invoke(app, ["recipes", "show", "article_256"]).output
    assert RunConfig.model_validate(yaml.safe_load(shown)) == load_config("article_256")
    (tmp_path / "mine.yaml").write_text(shown)
    assert load_config(file=tmp_path / "mine.yaml") == load_config("article_256")
    done = CliRunner().invoke(app, ["recipes", "show", "xl"])
    assert isinstance(done.exception, UserError) and "did you mean xl_256?" in str(done.exception)


def test_the_version_is_that_of_the_package():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"npp_ds {npp_ds.__version__}\n")


@pytest.mark.parametrize(
    "words, expected",
    [
        ("npp train --recipe x", {"xl_256", "xxl_256", "xxl_384"}),
        ("npp recipes show q", {"quickstart"}),
        ("npp plan optimizer.gr", {"optimizer.gradient_clipping="}),
        ("npp rep", {"report"}),
    ],
)
def test_the_shell_completes_commands_recipes_and_keys(words, expected):
    environment = {
        **os.environ,
        "_NPP_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    code = "import sys; sys.argv = ['npp']; from npp_ds.cli import app; app(prog_name='npp')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert set(done.stdout.split()) == expected, done.stderr


def test_near_commands_are_suggested():
    assert "Did you mean 'train'?" in CliRunner().invoke(app, ["trian"]).output
