"""Errors that a user can correct, and the exit status of a run that stopped early."""

# A run that a signal ended early, its state saved: the status that asks a scheduler to start it
# again (EX_TEMPFAIL).
STOPPED_EARLY = 75


class UserError(ValueError):
    """A mistake the user can mend. The command line prints its one line and exits with status 2."""


def require(holds: bool, message: str) -> None:
    """Raise `UserError` with the message unless something holds."""
    if not holds:
        raise UserError(message)
