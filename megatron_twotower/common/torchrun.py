"""torchrun, whose ranks have GRACE_SECONDS to end after a signal. `launch/torchrun.sh` runs it.

torchrun itself kills its ranks 30 seconds after it has passed SIGTERM or SIGUSR1 to them. A step
and a checkpoint may take longer. From torch 2.12 on this is a setting (torch/distributed/run.py,
`--shutdown-timeout`). In older releases it is the default of an argument that nobody passes; what
is done about that was written from their source, and did not run with them.
After the failure of a rank the others still have 30 seconds: they may be waiting for it.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Mapping
from typing import Any

DEFAULT_GRACE_SECONDS = 600


def grace_seconds(environment: Mapping[str, str]) -> int:
    """Return the value of GRACE_SECONDS.

    Raises:
        SystemExit: It is not a number of seconds; with one line.
    """
    text = environment.get("GRACE_SECONDS", str(DEFAULT_GRACE_SECONDS))
    if not text.isdecimal():
        raise SystemExit(f"GRACE_SECONDS: found {text!r}, expected a whole number of seconds")
    return int(text)


def lengthen(agent: Any, seconds: int) -> None:
    """Let torchrun of a release without the setting wait longer after a signal.

    Args:
        agent: The class `LocalElasticAgent` (torch 2.9, elastic/agent/server). Its `_shutdown` gets
            a signal as an argument only if torchrun itself received it, and closes the ranks with
            `_pcontext.close(signal, timeout=30)`.
        seconds: The time between the signal and SIGKILL.
    """
    shutdown = agent._shutdown

    @functools.wraps(shutdown)
    def patient(self: Any, *received: Any, **others: Any) -> Any:
        if received and self._pcontext:
            self._pcontext.close = functools.partial(self._pcontext.close, timeout=seconds)
        return shutdown(self, *received, **others)

    agent._shutdown = patient


def main() -> int:
    """Run torchrun with the arguments of this process.

    Returns:
        The exit status: 0, or 1 after a signal.
    """
    seconds = grace_seconds(os.environ)
    from torch.distributed import run
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.launcher.api import LaunchConfig

    if "shutdown_timeout" in {field.name for field in dataclasses.fields(LaunchConfig)}:
        sys.argv[1:1] = ["--shutdown-timeout", str(seconds)]
    else:
        lengthen(LocalElasticAgent, seconds)
    try:
        run.main()
    except SignalException as error:
        print(f"torchrun: {error}; its ranks have ended", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
