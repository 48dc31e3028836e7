"""The versions of packages that this program accepts, and the comparison with what is installed.

`setup.py` asks for the same ranges; a test compares the two. pip is not enough: a container brings
its own packages, and `--no-deps` leaves every range out. Releases of megatron-core differ in more
than their number: `mcore/releases.py`.
"""

import importlib.metadata

from packaging.specifiers import SpecifierSet

from megatron_twotower.common.errors import require

# By distribution. Containers carry builds between two releases, such as torch 2.9.0a0+50eac811a6.
ACCEPTED = {
    "torch": ">=2.9.0a0,<3",
    "transformers": ">=5.3,<6",
    # Layers without FP8 call transformer_engine.pytorch.quantization, which 2.9 added.
    "transformer-engine": ">=2.9,<2.21",
    # 2.2.4 does not import beside transformers 5, and its gradients overflow (docs/gpu.md).
    "mamba-ssm": ">=2.3.2,<3",
    "causal-conv1d": ">=1.5,<2",
    # Tried: 0.18.0 with torch 2.13. Releases before it were not.
    "torchao": ">=0.18,<1",
    # 2.52 is the first with token authentication; tried: 2.52.1 and 2.60.0.
    "ray": ">=2.52,<2.61",
}


def installed(package: str) -> str | None:
    """Return the installed version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def unfit(package: str) -> str | None:
    """Return what was found and expected, in a few words, if the installed version is not accepted.

    A package that is not installed, or that any version will do of, gives None.
    """
    found, accepted = installed(package), ACCEPTED.get(package)
    if found is None or accepted is None or SpecifierSet(accepted).contains(found, prereleases=True):
        return None
    return f"found {found}, expected {accepted}"


def require_fit(package: str, *, otherwise: str = "") -> None:
    """Refuse an installed version that is not accepted.

    Args:
        package: A distribution of `ACCEPTED`.
        otherwise: Another way out, for the end of the line.

    Raises:
        UserError: One line with the package, its version and what is accepted.
    """
    found = unfit(package)
    require(found is None, f"{package}: {found}{otherwise}")
