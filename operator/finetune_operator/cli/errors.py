"""What ends a command before it has done its work."""

from __future__ import annotations

USAGE = 2


class CliError(Exception):
    """A message for the user; the exit code is 2 unless the command says otherwise."""

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
