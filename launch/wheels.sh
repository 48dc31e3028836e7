#!/usr/bin/env bash
# Download the wheels that a machine without a network needs, also for another Python version: all
# requirements but torch, triton and CUDA's libraries, which must be installed there.
#
#   launch/wheels.sh wheels 3.12 2.11.0
#
# fills the folder `wheels` for Python 3.12 with torch 2.11.0.
#
#   KERNELS=1 launch/wheels.sh wheels 3.12 2.11.0
#
# adds the sources of mamba-ssm and causal-conv1d, to compile on a machine with nvcc and that torch
# (docs/gpu.md, Installation). Then, on the machine without a network, in a copy of this repository:
#
#   python -m pip install --no-index --find-links wheels --no-deps wheels/*.whl
#   python -m pip install --no-index --no-deps --no-build-isolation -e .
#
# Variables, and their defaults:
#
#   PYTHON      python3: the Python that downloads
#   LEAVE_OUT   none: a regular expression of more packages to leave out
set -euo pipefail

if [[ $# -ne 3 ]]; then
  echo "wheels.sh: found $# arguments, expected a folder, a Python version and a torch version" >&2
  exit 2
fi
folder=$1 version=$2 torch=$3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder"

# Resolve the requirements in setup.py for that Python with that torch, without a download.
"$python" - "$here/setup.py" > "$work/requirements.txt" <<'PYTHON'
import ast
import sys

tree = ast.parse(open(sys.argv[1]).read())
values = {
    target.id: ast.literal_eval(node.value)
    for node in tree.body if isinstance(node, ast.Assign)
    for target in node.targets if isinstance(target, ast.Name) and target.id in ("REQUIRES", "EXTRAS")
}
print("\n".join([*values["REQUIRES"], *values["EXTRAS"]["data"], "pytest>=8", "hypothesis>=6"]))
PYTHON
echo "torch==$torch" > "$work/constraints.txt"
# omegaconf needs a package that exists only as a source, of pure Python: build its wheel.
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" 'antlr4-python3-runtime==4.9.*'
"$python" -m pip install --quiet --dry-run --ignore-installed --only-binary :all: --target "$work/none" \
  --python-version "$version" --implementation cp --report "$work/report.json" \
  --find-links "$folder" --requirement "$work/requirements.txt" --constraint "$work/constraints.txt"
"$python" - "$work/report.json" "${LEAVE_OUT:-^$}" > "$work/pinned.txt" <<'PYTHON'
import json
import re
import sys

there = re.compile(rf"^(torch|triton|nvidia[-_].*|cuda[-_].*)$|{sys.argv[2]}", re.IGNORECASE)
for item in json.load(open(sys.argv[1]))["install"]:
    name = item["metadata"]["name"]
    if not there.search(name):
        print(f"{name}=={item['metadata']['version']}")
PYTHON
"$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$folder" \
  --python-version "$version" --implementation cp \
  --find-links "$folder" --requirement "$work/pinned.txt"
if [[ ${KERNELS:-0} == 1 ]]; then
  # Their setup.py asks torch and nvcc for versions, unless it skips the build.
  MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE \
    "$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: --dest "$folder" \
    'mamba-ssm>=2.3.2,<3' 'causal-conv1d>=1.5,<2'
fi
echo "$folder: $(find "$folder" -name '*.whl' | wc -l) wheels, $(du -sm "$folder" | cut -f1) MiB, for Python $version with torch $torch"
