"""What `finetune run` prints when a job has ended: the result, or why there is none and what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api.contract import Result
from finetune_operator.cli.session import End
from finetune_operator.cli.store import is_embedded, of_spec, run_storage
from finetune_operator.cli.table import table
from finetune_operator.cluster.port import Object

LOG_LINES = 15
MAX_SAMPLE = 600
"""Characters of a sample's text: enough to judge an answer by."""


def report(
    ends: Sequence[tuple[End, Object]], log_of: Callable[[str], Path | None], store: Mapping[str, str], file: Path
) -> None:
    """Print the end of a session to the standard output.

    Args:
        log_of: the log of a job's newest pod, by the job's name.
    """
    print(f"\n{table([job for _, job in ends], datetime.now(UTC))}\n")
    for end, job in ends:
        name = job["metadata"]["name"]
        print(*([f"--- {name}"] if len(ends) > 1 else []), *_about(end, job, log_of(name), store), sep="\n")
    if any(end in (End.SUSPENDED, End.KILLED) for end, _ in ends):
        print(f"Go on with: finetune run {file}")


def _about(end: End, job: Object, log: Path | None, store: Mapping[str, str]) -> list[str]:
    status = job.get("status") or {}
    match end:
        case End.SUCCEEDED:
            return _success(job, status, store)
        case End.FAILED:
            return _failure(status, log)
        case End.BLOCKED:
            return [f"Not started: {status.get('message', '')}"]
        case End.SUSPENDED:
            return [status.get("message", "Suspended")]
    return ["Ended at once. The next run goes on from the newest checkpoint."]


def _success(job: Object, status: Mapping[str, Any], store: Mapping[str, str]) -> list[str]:
    uri = status["output"]["uri"]
    warnings = [f"Warning: {text}" for text in status.get("warnings") or ()]
    lines = [*_metrics(status), *_sample(job, store), *warnings, f"The {status['output']['kind']} is at {uri}"]
    if is_embedded(store):
        lines.append(f"Fetch it with: finetune storage cp {uri}/ {job['metadata']['name']}/")
    return lines


def _metrics(status: Mapping[str, Any]) -> list[str]:
    before, after = status.get("baseline") or {}, status.get("metrics") or {}
    if not after:
        return []
    rows = [("held-out rows", "before", "after"), *((name, before.get(name, "-"), after[name]) for name in after)]
    return [*(f"{row[0]:<20}{row[1]:>12}{row[2]:>12}" for row in rows), ""]


def _sample(job: Object, store: Mapping[str, str]) -> list[str]:
    """One held-out prompt, answered before and after; nothing where none was asked for."""
    if not job["spec"]["evaluation"]["samples"]:
        return []
    uri = f"{job['spec']['output']['uri']}/result.json"
    found = run_storage(["cat", uri], of_spec(job["spec"], store), capture=True)
    try:
        samples = Result.model_validate_json(found.stdout).samples
    except ValidationError:
        return [f"(the samples in {uri} cannot be read)", ""]
    texts = samples[0] if samples else {}
    return [f"{name:<10} {_harmless(texts[name])}" for name in ("prompt", "before", "after") if name in texts] + [""]


def _harmless(text: str) -> str:
    """What a model wrote, without characters that a terminal would obey."""
    return "".join(
        sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text[:MAX_SAMPLE]
    )


def _failure(status: Mapping[str, Any], log: Path | None) -> list[str]:
    lines = [f"Failed: {status.get('message', '')}"]
    advice = (status.get("incident") or {}).get("advice")
    if advice and advice not in lines[0]:
        lines.append(f"Advice: {advice}")
    if log is None:
        return lines
    tail = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return [*lines, f"\nThe last lines of {log}:", *(f"  {line}" for line in tail)]
