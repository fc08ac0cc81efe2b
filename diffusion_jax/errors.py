"""The exceptions that end a command with a message instead of a traceback."""


class UsageError(ValueError):
    """What was asked for cannot be done.

    The message names the cause, the valid choices and the next step; the command line prints it without a traceback.
    """


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is no longer a number."""
