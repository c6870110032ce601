"""`finetune run`: a job on this machine, through the operator's own lifecycle."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_api import contract
from finetune_api.status import Phase
from finetune_operator.cli.display import make_display
from finetune_operator.cli.documents import Document, read_job
from finetune_operator.cli.errors import CliError
from finetune_operator.cli.report import report
from finetune_operator.cli.session import End, Session
from finetune_operator.cli.store import embedded, is_embedded, of_environment, of_spec, run_storage, uses_s3
from finetune_operator.cli.submission import Submitted, submit
from finetune_operator.cli.table import table
from finetune_operator.cli.validate import admitted
from finetune_operator.cluster.local.machine import InUseError, LocalMachine, StateFolder
from finetune_operator.cluster.local.runtime import machine_gpus
from finetune_operator.cluster.port import Key, Object


def run(options: argparse.Namespace, program: Sequence[str]) -> int:
    """Run the job of a file until it has ended; the exit code says how.

    Args:
        program: what a pod runs, as arguments of Python.
    """
    document = read_job(options.file)
    wanted = admitted(document)
    _require_gpus(wanted, document)
    _require_keys(wanted, document)
    state = StateFolder(options.state_dir)
    with _locked(state), _store(wanted["spec"], options.storage_dir or state.s3) as store:
        _upload(options.upload, store)
        return asyncio.run(_run(options, document, wanted, LocalMachine(state, store, program=program), store))


async def _run(
    options: argparse.Namespace, document: Document, wanted: Object, machine: LocalMachine, store: Mapping[str, str]
) -> int:
    submitted = await submit(machine.cluster, wanted, document.place, options.replace)
    if submitted.note:
        print(submitted.note, flush=True)
    if submitted.ended:
        print(table([submitted.job], datetime.now(UTC)))
        return 0 if submitted.phase is Phase.SUCCEEDED else 1
    await _prepare(machine, submitted, store)
    with make_display(sys.stdout) as display:
        end, job = await Session(machine, submitted.key, display).run()
    report(end, job, machine.runtime.newest_log(job["metadata"]["name"]), store, options.file)
    return 130 if end is End.KILLED else end.value


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


def _require_gpus(job: Object, document: Document) -> None:
    """Raise CliError where the machine has fewer GPUs than a pod asks for, rather than wait for one without end."""
    wanted, present = job["spec"]["resources"]["gpusPerNode"], len(machine_gpus())
    if wanted > present:
        raise CliError(
            f"{document.place}: spec.resources.gpusPerNode is {wanted}, and this machine has {present} GPU(s); "
            "set it to what there is, or to 0 for the CPU"
        )


def _require_keys(job: Object, document: Document) -> None:
    """Raise CliError where a Secret is named that nothing on this machine stands for."""
    s3 = job["spec"]["storage"]["s3"]
    missing = [key for key in contract.SECRET_KEYS[:2] if not os.environ.get(key)]
    if s3.get("secretName") and s3.get("endpoint") and missing:
        raise CliError(
            f"{document.place}: spec.storage.s3.secretName names a Secret, which this machine does not have; "
            f"export {' and '.join(missing)} instead"
        )


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


def _store(spec: Mapping[str, Any], folder: Path) -> AbstractContextManager[Mapping[str, str]]:
    if not uses_s3(spec) or spec["storage"]["s3"].get("endpoint"):
        return nullcontext({})
    found = of_environment(os.environ)
    if found is not None:
        return nullcontext(found)
    print(f"No S3 endpoint is named: using an embedded server, whose data lies in {folder}", flush=True)
    return embedded(folder)
