"""Packaging. Settings of the tools (ruff, mypy, pytest) are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "megatron_twotower" / "__init__.py").read_text())
assert VERSION is not None

REQUIRES = [
    # Tested with 2.13. On Linux the default build of torch is the CUDA one, of several gigabytes.
    # To get the CPU build, install it first (make install TORCH='...'): then this range is met.
    # 2.9.0a0: NVIDIA's containers carry builds such as 2.9.0a0+50eac811a6, which pip must not
    # replace. megatron_twotower/common/versions.py compares these ranges when the program starts.
    "torch>=2.9.0a0,<3",
    # The releases in mcore/releases.py: 0.16.1, the last for Python 3.11, and 0.19.
    "megatron-core>=0.16.1,<0.20,!=0.17.*,!=0.18.*",
    "transformers>=5.3,<6",
    "tokenizers",
    "safetensors>=0.4",
    "webdataset>=1.0,<2",
    "fsspec",  # opens shards at s3://, gs://, hf:// and others, with s3fs, gcsfs and so on
    "universal-pathlib>=0.3,<1",  # inputs there
    "hydra-core>=1.3,<2",
    "wandb",
    "pyyaml",
    "jinja2>=3",
    "psutil",  # Megatron's dist_checkpointing imports it without requiring it
    "numpy",
    "rich>=13",
    "matplotlib>=3.8",
]

EXTRAS = {
    # Kernels for NVIDIA GPUs. They need a CUDA build of torch, nvcc, and pip's option
    # --no-build-isolation: all but triton compile against the installed torch.
    "gpu": [
        # 2.9 is the first with transformer_engine.pytorch.quantization; tried: 2.11.0 and 2.20.2.
        "transformer-engine[pytorch]>=2.9,<2.21",
        # 2.2.4 does not import beside transformers 5, and its gradients overflow (docs/gpu.md).
        "mamba-ssm>=2.3.2,<3",
        "causal-conv1d>=1.5,<2",
        "triton",
    ],
    # Text in parquet files, and compressed with zstd.
    "data": ["pyarrow>=14", "zstandard>=0.22"],
    # Tasks of lm-evaluation-harness: `twotower evaluate --tasks`.
    "eval": ["lm-eval>=0.4.9"],
    # Weights of eight or four bits: `--quantize`, `twotower convert quantize`.
    # accelerate loads straight to the GPU that quantises.
    "quantize": ["torchao>=0.18,<1", "accelerate>=1.1"],
    # `--engine ray`: preparing data, generation and evaluation on a cluster.
    "cluster": ["ray>=2.52,<2.61"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.5",
        "hypothesis>=6",
        "lm-eval>=0.4.9",
        "peft>=0.17",  # it and accelerate train the exported class in tests
        "accelerate>=1.1",
        "fastapi",  # it, uvicorn and openai are what the server of transformers needs
        "uvicorn",
        "openai",
        "torchao>=0.18,<1",
        "ruff>=0.8",
        "mypy>=1.13",
        "pyarrow>=14",
        "zstandard>=0.22",
        "ray>=2.52,<2.61",
        "triton; platform_system == 'Linux'",  # its interpreter runs the kernels on a CPU
    ],
}

setup(
    name="megatron-twotower",
    version=VERSION.group(1),
    description="Train two-tower block-diffusion language models on Megatron Core",
    long_description=README.read_text() if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    # recipes/ stands at the top of the repository and is installed inside the package, as data.
    packages=[*find_packages(include=["megatron_twotower", "megatron_twotower.*"]), "megatron_twotower.recipes"],
    package_dir={"megatron_twotower": "megatron_twotower", "megatron_twotower.recipes": "recipes"},
    package_data={
        "megatron_twotower.recipes": ["**/*"],
        "megatron_twotower.generate.replay": ["*.css", "*.html", "*.js"],
        "megatron_twotower.report": ["templates/*"],
    },
    entry_points={"console_scripts": ["twotower = megatron_twotower.cli.main:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
