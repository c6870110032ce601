"""`finetune-operator`: the control plane on a Kubernetes cluster."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from finetune_operator.cluster.kubernetes import connect, load_configuration
from finetune_operator.endpoints import serving
from finetune_operator.engine import Engine
from finetune_operator.metrics import Metrics
from finetune_operator.settings import Settings, SettingsError, load
from finetune_operator.watch import watch


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def configure_logging(settings: Settings) -> None:
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else text)
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    # kopf logs every event that it delivers.
    logging.getLogger("kopf").setLevel(max(logging.WARNING, logging.getLevelName(settings.log_level)))


async def operate(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Whatever part ends with an error ends the process: the kubelet starts it anew."""
    configuration, metrics, watching = await load_configuration(), Metrics(), asyncio.Event()
    async with (
        connect(
            configuration, namespaces=settings.namespaces, request_seconds=settings.request_timeout_seconds
        ) as cluster,
        serving(settings.http_port, metrics, watching.is_set),
        asyncio.TaskGroup() as group,
    ):
        engine = Engine(cluster, settings, metrics=metrics)
        running = group.create_task(engine.run())
        await watch(engine.put, settings, configuration, watching)
        running.cancel()


def main(argv: Sequence[str] | None = None) -> int:
    try:
        settings = load(argv)
    except SettingsError as error:
        print(f"finetune-operator: {error}", file=sys.stderr)
        return 2
    configure_logging(settings)
    asyncio.run(operate(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
