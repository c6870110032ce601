"""`finetune run`: jobs on this machine, through the operator's own lifecycle."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

from finetune_api import contract
from finetune_operator.cli.display import make_display
from finetune_operator.cli.documents import Document, read_jobs
from finetune_operator.cli.errors import CliError
from finetune_operator.cli.report import report
from finetune_operator.cli.requirements import require, require_different, require_ended
from finetune_operator.cli.session import Session, end_of, exit_code
from finetune_operator.cli.store import embedded, is_embedded, of_environment, of_spec, run_storage, uses_s3
from finetune_operator.cli.submission import Submitted, submit, suspend_others
from finetune_operator.cli.table import table
from finetune_operator.cli.validate import admitted
from finetune_operator.cluster.local.machine import InUseError, LocalMachine, StateFolder
from finetune_operator.cluster.port import FINE_TUNE_JOB, Key, Object
from finetune_operator.cluster.rules import key_of
from finetune_operator.cluster.statefile import StateFile
from finetune_operator.references import named


def run(options: argparse.Namespace, program: Sequence[str]) -> int:
    """Run the jobs of a file until all have ended; the exit code says how.

    Args:
        program: what a pod runs, as arguments of Python.
    """
    documents = read_jobs(options.file)
    wanted = [admitted(document) for document in documents]
    require_different(documents, wanted)
    for document, job in zip(documents, wanted, strict=True):
        require(document, job)
    state = StateFolder(options.state_dir)
    with _locked(state):
        earlier = _named_in(state, wanted)
        require_ended(earlier)
        with _store([*wanted, *earlier], options.storage_dir or state.s3) as store:
            _upload(options.upload, store)
            machine = LocalMachine(state, store, program=program)
            return asyncio.run(_run(options, documents, wanted, machine, store))


async def _run(
    options: argparse.Namespace,
    documents: Sequence[Document],
    wanted: Sequence[Object],
    machine: LocalMachine,
    store: Mapping[str, str],
) -> int:
    pairs = zip(documents, wanted, strict=True)
    jobs = [await submit(machine.cluster, job, document.place, options.replace) for document, job in pairs]
    print(*(f"{job.note}\n" for job in jobs if job.note), sep="", end="", flush=True)
    open_jobs = [job for job in jobs if not job.ended]
    if not open_jobs:
        print(table([job.job for job in jobs], datetime.now(UTC)))
        return exit_code(end_of(job.job) for job in jobs)
    await suspend_others(machine.cluster, [job.key for job in open_jobs])
    for job in open_jobs:
        await _prepare(machine, job, store)
    with make_display(sys.stdout, [job.key.name for job in open_jobs]) as display:
        ends = await Session(machine, [job.key for job in open_jobs], display).run()
    report(ends, machine.runtime.newest_log, store, options.file)
    return exit_code([*(end for end, _ in ends), *(end_of(job.job) for job in jobs if job.ended)])


async def _prepare(machine: LocalMachine, submitted: Submitted, store: Mapping[str, str]) -> None:
    """What a cluster's administrator has done before: buckets, and the certificate authority's ConfigMap."""
    spec = submitted.job["spec"]
    output = spec["output"]["uri"]
    if is_embedded(store) and output.startswith("s3://"):
        _storage_or_fail(["mb", output], store)
    if submitted.replaced is not None:
        # Checkpoints belong to one incarnation of a job; the trainer refuses those of another.
        old = submitted.replaced["spec"]
        _storage_or_fail(["rm", f"{old['output']['uri']}/checkpoints/"], of_spec(old, store))
    bundle = _ca_bundle(spec["storage"]["s3"].get("caBundleConfigMap"), submitted.key)
    if bundle is not None:
        await machine.cluster.apply(bundle)


def _ca_bundle(name: str | None, key: Key) -> Object | None:
    """The ConfigMap of that name, made from the file that the SDK's own variable names."""
    if name is None:
        return None
    file = os.environ.get(contract.ENV_S3_CA_BUNDLE)
    if file is None:
        raise CliError(
            f"storage.s3.caBundleConfigMap {name!r}: export {contract.ENV_S3_CA_BUNDLE} with its path instead"
        )
    data = {Path(contract.CA_BUNDLE_FILE).name: Path(file).read_text(encoding="utf-8")}
    metadata = {"name": name, "namespace": key.namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


@contextmanager
def _locked(state: StateFolder) -> Iterator[None]:
    """The state folder for this process alone."""
    try:
        state.lock()
    except InUseError as error:
        raise CliError(str(error)) from error
    try:
        yield
    finally:
        state.unlock()


def _upload(pairs: Sequence[str], store: Mapping[str, str]) -> None:
    for pair in pairs:
        source, separator, target = pair.partition("=")
        if not separator or not target.startswith("s3://"):
            raise CliError(f"--upload {pair}: write it as PATH=s3://bucket/key")
        _storage_or_fail(["cp", source, target], store)


def _storage_or_fail(arguments: Sequence[str], store: Mapping[str, str]) -> None:
    if run_storage(arguments, store).returncode != 0:
        raise CliError(f"`finetune storage {' '.join(arguments)}` failed, see above", 1)


def _named_in(state: StateFolder, jobs: Sequence[Object]) -> list[Object]:
    """Jobs of earlier runs that these go on from: what they have delivered is read now."""
    wanted = {Key(key_of(job).namespace, name) for job in jobs for name in named(job).names}
    wanted -= {key_of(job) for job in jobs}
    known = StateFile(state.objects).load().get("objects", [])
    return [obj for obj in known if obj["kind"] == FINE_TUNE_JOB.kind and key_of(obj) in wanted]


def _store(jobs: Sequence[Object], folder: Path) -> AbstractContextManager[Mapping[str, str]]:
    """Variables for all pods: of the service that the environment names, or of the embedded one."""
    using = [job["spec"] for job in jobs if uses_s3(job["spec"])]
    unnamed = [spec for spec in using if not spec["storage"]["s3"].get("endpoint")]
    if not unnamed:
        return nullcontext({})
    if len(unnamed) < len(using):
        raise CliError(
            "some of the jobs name an S3 service and some do not, and here all use the same; set "
            "spec.storage.s3.endpoint in all of them, or give them files of their own"
        )
    found = of_environment(os.environ)
    if found is not None:
        return nullcontext(found)
    print(f"No S3 endpoint is named: using an embedded server, whose data lies in {folder}", flush=True)
    return embedded(folder)
