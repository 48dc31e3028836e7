"""Python's garbage collector during training: at the same step on all ranks."""

import contextlib
import gc
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def collected_together(every: int) -> Iterator[Callable[[int], None]]:
    """Collect garbage after every so many steps, instead of whenever Python chooses.

    Python's choice depends on how many objects a process has made. So another rank collects at
    another step, and all ranks wait each time. What exists at the start, such as modules, stays for
    the complete run: it is frozen, so that no collection visits it.

    Args:
        every: The number of steps; 0 leaves the collector as it is.

    Yields:
        The function to call after each step, with its number.
    """
    if not every:
        yield lambda step: None
        return
    enabled, own_freeze = gc.isenabled(), not gc.get_freeze_count()
    gc.disable()
    gc.collect()
    if own_freeze:
        gc.freeze()

    def after_step(step: int) -> None:
        if step % every == 0:
            gc.collect()

    try:
        yield after_step
    finally:
        if own_freeze:
            gc.unfreeze()
        if enabled:
            gc.enable()
