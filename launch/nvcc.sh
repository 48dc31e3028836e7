#!/usr/bin/env bash
# nvcc for one architecture. The setup.py of mamba-ssm and of causal-conv1d names its architectures
# (nine with CUDA 13) and reads no setting. torch can use another nvcc: this one, which drops the
# architectures in its arguments:
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
