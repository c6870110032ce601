"""Errors that say whose fault it is: each carries the exit code by which the operator decides what happens next."""

from __future__ import annotations

from finetune_api.contract import ExitCode


class TrainerError(Exception):
    """A failure that is understood.

    Args:
        message: what happened, naming the field, file or line.
        advice: what the user can do about it; empty when nothing is known to help.
    """

    exit_code: ExitCode = ExitCode.SOFTWARE

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice


class UsageError(TrainerError):
    """The spec cannot work, whatever is retried."""

    exit_code = ExitCode.USAGE


class DataError(TrainerError):
    """The dataset cannot work, whatever is retried."""

    exit_code = ExitCode.DATA


class UnavailableError(TrainerError):
    """Storage, hub or peers did not answer; later they may."""

    exit_code = ExitCode.UNAVAILABLE


class PermissionRefusedError(TrainerError):
    """Credentials were refused."""

    exit_code = ExitCode.NOPERM


class OutOfMemoryError(TrainerError):
    """Accelerator memory was exhausted."""

    exit_code = ExitCode.OUT_OF_MEMORY


class DivergedError(TrainerError):
    """Loss or gradient was not finite, twice from the same checkpoint."""

    exit_code = ExitCode.DIVERGED


class StoppedError(TrainerError):
    """SIGTERM was obeyed and the state is saved: not a failure, but never exit 0."""

    exit_code = ExitCode.TEMPFAIL


_KINDS = (
    UsageError,
    DataError,
    UnavailableError,
    PermissionRefusedError,
    OutOfMemoryError,
    DivergedError,
    StoppedError,
)


def error_of(exit_code: int, message: str, advice: str = "") -> TrainerError:
    """The error that stands for an exit code; what is unknown is a TrainerError."""
    kind = next((kind for kind in _KINDS if kind.exit_code == exit_code), TrainerError)
    return kind(message, advice)
