"""`python -m megatron_twotower`: the same commands as `twotower`, for torchrun and srun."""

from megatron_twotower.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
