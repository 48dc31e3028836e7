"""Errors that a user can correct, and the exit status of a run that stopped early."""

# The exit status of a run that a signal ended early, with its state saved (EX_TEMPFAIL). It asks a
# scheduler to start the run again.
STOPPED_EARLY = 75


class UserError(ValueError):
    """A mistake the user can correct. The command line prints its one line and exits with 2."""


def require(condition: bool, message: str) -> None:
    """Raise a `UserError` with this message if the condition is false."""
    if not condition:
        raise UserError(message)
