"""`finetune plan`: what the operator would create, and what the trainer would train."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob
from finetune_operator.cli.documents import read_jobs
from finetune_operator.cli.errors import CliError
from finetune_operator.cli.preview import what_trains
from finetune_operator.cli.simulation import what_it_takes
from finetune_operator.cli.trainer import Question
from finetune_operator.cli.validate import admitted
from finetune_operator.plan import plan
from finetune_operator.references import references
from finetune_operator.settings import load


class Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, so that job.json can be read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


Dumper.add_representer(str, _text)


def show_plan(options: argparse.Namespace) -> int:
    """Print the manifests of each job as YAML, after a summary in comments."""
    if options.world_size and not options.simulate:
        raise CliError("--world-size belongs to --simulate; add that")
    for job in [FineTuneJob.from_wire(admitted(document)) for document in read_jobs(options.file)]:
        manifests = plan(job, load([])).all()
        print("\n".join(f"# {line}" for line in chain(summary(job), _told_by_trainer(job, options))))
        print(yaml.dump_all(manifests, Dumper=Dumper, sort_keys=False, width=120, explicit_start=True), end="")
    return 0


def _told_by_trainer(job: FineTuneJob, options: argparse.Namespace) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="finetune-") as scratch:
        question = Question(job, options.state_dir, Path(scratch), options.config)
        yield from what_trains(question)
        if options.simulate:
            yield from what_it_takes(question, options.world_size)


def summary(job: FineTuneJob) -> Iterator[str]:
    """The job in a few lines, with what its strategy, task and hardware imply where the file says nothing."""
    spec = resolve(job).spec
    pods, gpus, memory = spec.resources.nodes, spec.resources.gpus_per_node, spec.resources.memory
    yield f"{job.metadata.namespace}/{job.metadata.name}: {spec.strategy.type.value} for {spec.task.type.value}"
    yield f"from {spec.model.uri} with {spec.dataset.uri} to {spec.output.uri}"
    yield f"{pods} pod(s), each with {gpus or 'no'} GPU(s), {spec.resources.cpu} CPU and {memory} of memory"
    values, ranks = spec.hyperparameters, spec.resources.ranks
    if ranks > 1:
        rows = values.per_device_batch_size * values.gradient_accumulation_steps * ranks
        yield f"{ranks} processes train together: {rows:,} rows a step, a learning rate of {values.learning_rate:g}"
    for reference in references(job.spec):
        yield f"{reference.field} is what job {reference.job} delivers, and is filled in when that has succeeded"
    for path, value in _differences(job.to_wire()["spec"], spec.to_wire(), "spec"):
        yield f"resolved: {path} = {value}"


def _differences(given: Any, resolved: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(given, dict) and isinstance(resolved, dict):
        for key, value in resolved.items():
            yield from _differences(given.get(key), value, f"{path}.{key}")
    elif given != resolved:
        yield path, resolved
