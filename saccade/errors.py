"""The one error that is meant for people."""


class UserError(ValueError):
    """What was wrong, where, and what to do. The command prints it and ends with exit code 2, without a traceback."""
