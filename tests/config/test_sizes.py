"""A model size is one entry in a table."""

import pytest
import torch
from typer.testing import CliRunner

from npp_ds.checkpoint.open import open_weights
from npp_ds.cli import app
from npp_ds.config.load import load_config
from npp_ds.errors import UserError
from npp_ds.sizes import SIZES, parameter_count
from published_models import published_model


def test_one_table_entry_adds_a_size_to_config_plan_parameter_counts_and_import(tmp_path, monkeypatch):
    model, _ = published_model("gpt_small")
    shape = {"n_layers": model.config.n_layers, "n_heads": model.config.n_heads, "dim": model.config.dim}
    with pytest.raises(UserError, match=r"model.size: found '3B', expected 'B', 'L', 'XL', '1B', 'XXL' or '2B'"):
        load_config("paper_256", overrides=["model.size=3B"])

    monkeypatch.setitem(SIZES, "3B", shape)
    config = load_config("paper_256", overrides=["model.size=3B"])
    assert config.model.parameters() == parameter_count(**shape)
    with pytest.raises(UserError, match="'2B' or '3B'"):
        load_config("paper_256", overrides=["model.size=4B"])

    plan = CliRunner().invoke(app, ["plan", "--recipe", "paper_256", "model.size=3B", "--gpus", "1", "--json"])
    assert f'"parameters": {parameter_count(**shape)}' in plan.output

    torch.save({"model": model.state_dict()}, tmp_path / "published.pt")
    opened = open_weights(tmp_path / "published.pt", n_heads=shape["n_heads"], grid_size=model.config.grid_size)
    assert opened.model.size == "3B"
