"""`finetune-operator`: the control plane on a Kubernetes cluster."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Sequence

from finetune_operator import logs
from finetune_operator.cluster.echoes import Echoes
from finetune_operator.cluster.kubernetes import connect, load_configuration
from finetune_operator.endpoints import serving
from finetune_operator.engine import Engine
from finetune_operator.health import Health
from finetune_operator.metrics import Metrics
from finetune_operator.replica import Replica, replica
from finetune_operator.settings import Settings, SettingsError, load
from finetune_operator.watch import Stop, watch
from finetune_operator.watches import Watches

GARBAGE = 50_000
"""Objects until a search for cycles. JSON has none, so that with Python's 700 a fifth of the processor time went into
searches in vain; what kopf leaves in cycles comes to a few MiB until then."""


async def operate(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Whatever part ends with an error ends the process: the kubelet starts it anew."""
    configuration, metrics, watches, stop = await load_configuration(), Metrics(), Watches(time.monotonic), Stop()
    echoes = Echoes()
    health = Health(watches)
    metrics.watch(watches)
    async with (
        replica(settings) as this,
        connect(
            configuration,
            namespaces=settings.namespaces,
            request_seconds=settings.request_timeout_seconds,
            may_write=this.leads,
            answered=metrics.answered,
            echoes=echoes,
        ) as cluster,
        serving(settings.http_port, metrics, health),
        asyncio.TaskGroup() as group,
    ):
        metrics.leader.set_function(this.leads)
        engine = Engine(cluster, settings, metrics=metrics, gate=this.leading, watches=watches, listed=health.listed)
        running = [
            group.create_task(engine.run()),
            group.create_task(health.knock_for_ever(cluster.knock)),
            group.create_task(_stop_gracefully(stop, health, engine, this)),
        ]
        await watch(engine.put, watches, echoes, settings=settings, configuration=configuration, stop=stop)
        for task in running:
            task.cancel()


async def _stop_gracefully(stop: Stop, health: Health, engine: Engine, this: Replica) -> None:
    """Take no job any more, finish what is under way, give the Lease up: only then may another replica begin."""
    await stop.asked.wait()
    health.stopping = True
    await engine.drain()
    await this.release()
    stop.drained.set()


def main(argv: Sequence[str] | None = None) -> int:
    try:
        settings = load(argv)
    except SettingsError as error:
        print(f"finetune-operator: {error}", file=sys.stderr)
        return 2
    logs.configure(settings)
    # What is there by now stays, and is never searched again.
    gc.freeze()
    gc.set_threshold(GARBAGE)
    asyncio.run(operate(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
