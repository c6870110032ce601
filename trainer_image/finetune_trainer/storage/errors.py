"""What can go wrong between us and a store, beyond the errors that every part of the trainer knows."""

from __future__ import annotations

from finetune_api.contract import ExitCode
from finetune_trainer.errors import TrainerError, UnavailableError


class MissingError(TrainerError):
    """A bucket, an object or a file is not there. Callers who know which field named it say so in their own error."""

    exit_code = ExitCode.USAGE


class MissingContainerError(MissingError):
    """The bucket or the volume itself is not there, so nothing can be said of what is in it."""


class ChangedError(UnavailableError):
    """An object was replaced while it was read: the next attempt reads the new one whole."""


class CorruptError(UnavailableError):
    """Bytes arrived that are not those that were stored, again and again."""


class DiskFullError(UnavailableError):
    """The folder cannot take the bytes; on another node it may."""


class TransientError(Exception):
    """One try failed in a way that the next may not. Never leaves this package: patience ends in UnavailableError."""
