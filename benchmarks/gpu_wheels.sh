#!/usr/bin/env bash
# Collect in .whl/ (about 5 MB, ignored by git) the packages that a GPU machine without a network may lack, in addition to
# PyTorch, torchvision and their dependencies. `python -m benchmarks.gpu_check` installs the missing ones from there.
#
#     benchmarks/gpu_wheels.sh                               # the versions in .venv, for Python 3.12 on x86-64
#     GPU_PYTHON_VERSION=3.11 PYTHON=python3 benchmarks/gpu_wheels.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
target=${GPU_PYTHON_VERSION:-3.12}
packages=(
  pydantic pydantic_core typing_inspection annotated_types typing_extensions
  torch_fidelity webdataset braceexpand hjson
)

version_of() { "$python" -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' "$1"; }

rm -rf .whl
mkdir .whl
# DeepSpeed is published as source only. Without prebuilt operators it is pure Python.
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --wheel-dir .whl "deepspeed==$(version_of deepspeed)"
pins=()
for package in "${packages[@]}"; do pins+=("$package==$(version_of "$package")"); done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$target" --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  --dest .whl "${pins[@]}"
du -ch .whl/*.whl
# Print the dependencies that are not in .whl/; the GPU machine must have them.
"$python" - .whl <<'PYTHON'
import re
import sys
import zipfile
from pathlib import Path

needed, carried = set(), set()
for wheel in Path(sys.argv[1]).glob("*.whl"):
    carried.add(wheel.name.split("-")[0].lower().replace("_", "-"))
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        for line in archive.read(metadata).decode().splitlines():
            if line.startswith("Requires-Dist:") and "extra ==" not in line:
                needed.add(re.split(r"[ <>=!~;\[(]", line.split(": ")[1])[0].lower().replace("_", "-"))
print("not carried, expected there:", ", ".join(sorted(needed - carried)))
PYTHON
