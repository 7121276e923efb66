"""Imports between packages go one way, as docs/architecture.md lists them; no modules import each other in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "npp_ds"
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in PACKAGE.rglob("*.py")
}


def imports_of(path: Path) -> set[str]:
    """All modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & MODULES.keys()) or {node.module}
    return found


def layers() -> list[str]:
    """The packages and loose modules in the order of docs/architecture.md."""
    block = (ROOT / "docs/architecture.md").read_text().split("## Packages")[1].split("```")[1]
    return [line.split()[0] for line in block.strip().splitlines()]


def test_the_list_names_every_package_and_at_most_three_loose_modules():
    entries = {p.stem for p in PACKAGE.iterdir() if (p / "__init__.py").is_file() or p.suffix == ".py"}
    assert set(layers()) == entries - {"__init__", "__main__"}
    assert len([name for name in layers() if (PACKAGE / f"{name}.py").is_file()]) <= 3


@pytest.mark.parametrize("package", layers())
def test_a_package_imports_only_what_stands_above_it(package):
    allowed = {*layers()[: layers().index(package) + 1]}
    for module, path in MODULES.items():
        if module.split(".")[1:2] == [package]:
            used = {name.split(".")[1] for name in imports_of(path) if name.startswith("npp_ds.")}
            assert used <= allowed, f"{module} imports {used - allowed}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: imports_of(path) & MODULES.keys() - {module, "npp_ds"} for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_training_imports_deepspeed():
    users = {m for m, path in MODULES.items() if any(n.split(".")[0] == "deepspeed" for n in imports_of(path))}
    assert users and all(module.startswith("npp_ds.training.") for module in users)
