#!/usr/bin/env bash
# nvcc for one architecture alone. mamba-ssm and causal-conv1d name theirs in setup.py (nine with CUDA 13) and read no
# setting; torch lets another nvcc stand in, so this one drops what they name:
#
#   ARCH=90 PYTORCH_NVCC=$PWD/launch/nvcc.sh pip install --no-build-isolation '.[gpu]'
#
# ARCH   compute capability without its dot (90, Hopper).
set -euo pipefail

kept=()
while [[ $# -gt 0 ]]; do
  case $1 in
    -gencode | --generate-code) shift ;;
    -gencode=* | --generate-code=*) ;;
    *) kept+=("$1") ;;
  esac
  shift
done
arch=${ARCH:-90}
exec "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" "${kept[@]}" -gencode "arch=compute_$arch,code=sm_$arch"
