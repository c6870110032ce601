"""Log lines, each with the job and the attempt that it is about, as text for people or as JSON for collectors."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from finetune_operator.cluster.port import Key
from finetune_operator.settings import Settings

_job: ContextVar[Key | None] = ContextVar("job", default=None)
_attempt: ContextVar[int | None] = ContextVar("attempt", default=None)


@contextmanager
def about(key: Key) -> Iterator[None]:
    """Lines logged in the block are about this job."""
    job, attempt = _job.set(key), _attempt.set(None)
    try:
        yield
    finally:
        _job.reset(job)
        _attempt.reset(attempt)


def of_attempt(attempt: int) -> None:
    """What follows in the block of `about` is about this attempt."""
    _attempt.set(attempt)


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        job, attempt = _job.get(), _attempt.get()
        if job is not None:
            fields |= {"namespace": job.namespace, "job": job.name}
        if attempt:
            fields["attempt"] = attempt
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def configure(settings: Settings) -> None:
    """From here on, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else text)
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    # kopf logs every event that it delivers.
    logging.getLogger("kopf").setLevel(max(logging.WARNING, logging.getLevelName(settings.log_level)))
