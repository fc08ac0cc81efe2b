"""The exceptions that end a command with a message instead of a traceback."""


class UsageError(ValueError):
    """What was asked for cannot be done.

    The message names the cause, the valid choices and the next step; the command line prints it without a traceback.
    """


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is no longer a number."""


class SamplingDiverged(RuntimeError):
    """Samples came out as NaN or inf."""

    def __init__(self, bad: int, num: int):
        super().__init__(
            f'{bad} of {num} samples are not finite: the network returned NaN or inf on the way. Check its parameters '
            '(a diverged run?), a guidance_scale that is too large, or an eps-prediction used where there is no signal '
            '(zero terminal SNR: predict v or x0).'
        )


class Interrupted(RuntimeError):
    """A signal asked the run to end, and it was saved."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f'stopped at step {step} and saved it: the same command goes on from there.')
        self.signal_number = signal_number


class SavingFailed(RuntimeError):
    """A checkpoint could not be written; those from before are whole."""
