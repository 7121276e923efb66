"""Files of weights from a stranger: each is refused within 20 seconds, with one line that names what is wrong."""

import json
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import assert_refused
from safetensors.torch import save_file

from npp_ds.checkpoint.open import METADATA_KEY, open_weights
from sample_sets import MODEL, tiny_model

pytestmark = pytest.mark.slow

WQKV, CLASSES, CODES = "layers.0.attention.wqkv.weight", "cls_embedding.embedding_table.weight", "tok_embeddings.weight"


def published(change: Callable[[dict], Any]) -> Callable[[Path], Path]:
    """A checkpoint in the published layout, of what `change` makes of good weights."""

    def build(folder: Path) -> Path:
        torch.save(change(tiny_model().state_dict()), folder / "c2i.pt")
        return folder / "c2i.pt"

    return build


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], Path]:
    """A published checkpoint with one tensor changed."""
    return published(lambda state: {"model": {**state, name: change(state[name])}})


def described(text: str | None = None, **changes: Any) -> Callable[[Path], Path]:
    """An exported file of good weights, with other metadata."""
    good = {
        "format": 1, "name": "tiny", "step": 3, "kind": "raw", "model": MODEL, "tokenizer": None, "class_names": [],
        "config_hash": None,
    }  # fmt: skip

    def build(folder: Path) -> Path:
        path = folder / "weights.safetensors"
        found = {name: value for name, value in {**good, **changes}.items() if value is not ...}
        save_file(tiny_model().state_dict(), path, {METADATA_KEY: json.dumps(found) if text is None else text})
        return path

    return build


def content(data: bytes, name: str = "weights.safetensors") -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return build


def special(make: Callable[[Path], None]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        make(folder / "weights.safetensors")
        return folder / "weights.safetensors"

    return build


OTHER_TYPE = "expected a floating-point type"
CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "integer keys": (published(lambda state: dict(enumerate(state.values()))), "no weights under model"),
    "no dict": (published(lambda state: list(state.values())), "no weights under model"),
    "escape sequences in names": (published(lambda s: {f"\33[2J{k}": v for k, v in s.items()}), "is missing"),
    "names of 5,000 letters": (published(lambda s: {"a" * 5000 + k: v for k, v in s.items()}), "is missing"),
    "sparse": (tensor(WQKV, torch.Tensor.to_sparse), f"{WQKV} is torch.sparse_coo, {OTHER_TYPE}"),
    "meta": (tensor(WQKV, lambda t: t.to("meta")), f"{WQKV} is without values, {OTHER_TYPE}"),
    "complex": (tensor(WQKV, lambda t: t.to(torch.complex64)), f"{WQKV} is torch.complex64, {OTHER_TYPE}"),
    "a trillion columns": (tensor(WQKV, lambda t: t[:, :1].expand(96, 1 << 40)), f"{WQKV} is [96, 1099511627776]"),
    "one value for many": (tensor(WQKV, lambda t: torch.ones(1, 1).expand(96, 32)), f"{WQKV} is a few stored values"),
    "no rows": (tensor(WQKV, lambda t: t[:0]), "no model can have its shape"),
    "no columns": (tensor(CODES, lambda t: t[:, :0]), "its width 0 does not divide"),
    "no codes": (tensor(CODES, lambda t: t[:0]), "no model can have its shape"),
    "no classes": (tensor(CLASSES, lambda t: t[:0]), "no model can have its shape"),
    "a scalar": (tensor(WQKV, lambda t: t[0, 0]), f"{WQKV} is []"),
    "empty rotary table": (
        published(lambda s: {"model": {**s, "freqs_cis": torch.empty(0, 0, 2), WQKV: s[WQKV][1:]}}),
        "rows of keys and values",
    ),
    "more classes than numbers": (
        published(lambda s: {"model": s, "args": Namespace(num_classes=10**30)}),
        "args.num_classes is 1000",
    ),
    "NaN": (tensor(WQKV, lambda t: t * torch.nan), f"{WQKV}: 3,072 of 3,072 values are NaN"),
    "empty pickle": (content(b"", "c2i.pt"), "damaged, or not a PyTorch checkpoint"),
    "deep pickle": (content(b"\x80\2" + b"]" * 99999 + b"a" * 99998 + b".", "c2i.pt"), "damaged"),
    "empty": (content(b""), "damaged or no safetensors file"),
    "a header of 2 ** 63 bytes": (content(b"\xff" * 16), "damaged or no safetensors file"),
    "no metadata": (special(lambda path: save_file(tiny_model().state_dict(), path)), "not written by npp_ds"),
    "FIFO": (special(os.mkfifo), "not found"),
    "device": (special(lambda path: path.symlink_to("/dev/zero")), "not found"),
    "deep JSON": (described("[" * 100_000), "nested too deeply"),
    "another JSON": (described("[1]"), "is not readable"),
    "format 2": (described(format=2), "format 2, this version reads 1"),
    "no variant": (described(kind=...), "kind: Field required"),
    "variant that is a path": (described(kind="x/../../../../escaped"), "kind: Input should be 'raw' or 'ema'"),
    "step that is a path": (described(step="../7"), "step: Input should be a valid integer"),
    "step that is true": (described(step=True), "step: Input should be a valid integer"),
    "step below 0": (described(step=-1), "step: Input should be greater"),
    "infinite step": (described('{"format": 1, "step": 1e400}'), "out of range"),
    "name that is a path": (described(name="../x"), "name: Value error, expected a plain file name"),
    "name with escape sequences": (described(name="\33[2J"), "name: Value error, expected a plain file name"),
    "tokenizer elsewhere": (described(tokenizer={"name": "/x", "sha256": "0" * 64}), "tokenizer.name: Value error"),
    "class names of another number": (described(class_names=["a"]), "1 class_names for 3 classes"),
    "class name with escape sequences": (described(class_names=["\33]0;", "b", "c"]), "class_names.0: Value error"),
    "a billion layers": (described(model={**MODEL, "n_layers": 10**9}), "model.n_layers: Input should be less"),
    "a trillion wide": (described(model={**MODEL, "dim": 10**12}), "model.dim: Input should be less"),
    "other sizes": (described(model={**MODEL, "n_layers": 3}), "layers.2.attention.wqkv.weight is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_weights_are_refused(tmp_path, case):
    build, phrase = CASES[case]
    path = build(tmp_path)
    out = tmp_path / "out" / "exported.safetensors"
    out.parent.mkdir()
    heads = ["--heads", "2"] if path.suffix == ".pt" else []
    assert str(path) in assert_refused("export", path, "--out", out, *heads, phrase=phrase)
    assert not list(out.parent.iterdir())


def test_weights_that_only_look_bad_are_taken(tmp_path):
    """Steps that are none and an empty rotary table say nothing about the weights."""
    state = tiny_model().state_dict()
    torch.save(
        {"model": {**state, "freqs_cis": torch.empty(9, 0, 2), 5: state[WQKV]}, "steps": -7}, tmp_path / "c2i.pt"
    )
    found = open_weights(tmp_path / "c2i.pt", n_heads=2)
    assert found.step is None and torch.equal(found.read()[WQKV], state[WQKV])
