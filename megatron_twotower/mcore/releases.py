"""The releases of Megatron Core that this project runs on, and what differs between them."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_twotower.common.errors import UserError


@dataclass(frozen=True)
class Release:
    """What one release of megatron-core does differently from the others.

    Attributes:
        results_queue_function: The function of `filesystem_async.py` that returns the queue for the
            results of a save.
        device_literal_module: The module with a `device="cuda"` literal that other releases do not
            have.
        save_arguments: Arguments of `dist_checkpointing.save` that select Megatron's own
            asynchronous save.
    """

    results_queue_function: str
    device_literal_module: str
    save_arguments: Mapping[str, str] = field(default_factory=dict)


RELEASES = {
    # 0.16.1 is the last release for Python 3.11.
    "0.16": Release(
        results_queue_function="_get_write_results_queue",
        device_literal_module="megatron.core.transformer.moe.moe_utils",
    ),
    # 0.19.2 asks for nvidia-resiliency-ext unless its own asynchronous save is selected.
    "0.19": Release(
        results_queue_function="get_write_results_queue",
        device_literal_module="megatron.core.transformer.moe.token_dispatcher",
        save_arguments={"async_strategy": "mcore"},
    ),
}


def _installed_version() -> str:
    try:
        return ".".join(importlib.metadata.version("megatron-core").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return "none"


# The installed release, as a key of `RELEASES`; "none" if megatron-core is not installed.
RELEASE = _installed_version()


def installed_release() -> Release:
    """Return what is specific to the installed release.

    Raises:
        UserError: The installed release is not one of `RELEASES`.
    """
    if RELEASE not in RELEASES:
        raise UserError(f"megatron-core: found {RELEASE}, expected {' or '.join(RELEASES)}")
    return RELEASES[RELEASE]
