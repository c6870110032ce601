"""Other jobs that a job names (`job://name`), and what of them matters to it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.job import FineTuneJob, FineTuneJobSpec
from finetune_api.status import TERMINAL, Phase
from finetune_operator.cluster.port import Object

SCHEME = "job://"
MODEL = "spec.model.uri"
ANGLE = "spec.strategy.select.angle.from"


@dataclass(frozen=True)
class Reference:
    """A field that names another job of the same namespace."""

    field: str
    """Its path, as people write it."""
    job: str


@dataclass(frozen=True)
class Named:
    """A job that others name. Whatever of it cannot be read here is empty: it may be of another release."""

    phase: str
    reason: str
    message: str
    strategy: str
    merge: bool
    uri: str
    """Its spec.output.uri."""
    delivered: str
    """URI of what it has delivered; empty where it has not, or where that word was lost."""
    kind: str
    """`adapter` or `model`: what it has delivered."""
    names: tuple[str, ...]
    """Jobs that it names itself."""

    @property
    def is_held(self) -> bool:
        """Whether it may wait for jobs that it names."""
        return self.phase in ("", Phase.BLOCKED)


def references(spec: FineTuneJobSpec) -> tuple[Reference, ...]:
    """All of them; no job names itself, the CRD refuses it."""
    return tuple(Reference(field, uri.removeprefix(SCHEME)) for field, uri in places(spec) if uri.startswith(SCHEME))


def pending(job: FineTuneJob) -> tuple[Reference, ...]:
    """Those that must be known before the job can start; what it has started with is never asked for again."""
    status = job.status
    if status.attempt or status.phase in TERMINAL:
        return ()
    return tuple(reference for reference in references(job.spec) if reference.field not in status.references)


def with_places(job: FineTuneJob) -> FineTuneJob:
    """The job with the places in it that the jobs it names have delivered to, as far as they are known; a copy where
    that changes anything, since copies of every job that starts add up."""
    known = job.status.references
    if not known:
        return job
    changed = job.model_copy(deep=True)
    spec = changed.spec
    spec.model.uri = known.get(MODEL, spec.model.uri)
    angle = spec.strategy.select.angle if spec.strategy.select else None
    if angle is not None:
        angle.from_ = known.get(ANGLE, angle.from_)
    return changed


def places(spec: FineTuneJobSpec) -> Iterator[tuple[str, str]]:
    """Every URI of a job that is read from or written to, with its field."""
    yield MODEL, spec.model.uri
    yield "spec.dataset.uri", spec.dataset.uri
    yield "spec.output.uri", spec.output.uri
    if spec.model.adapter is not None:
        yield "spec.model.adapter.uri", spec.model.adapter.uri
    if spec.dataset.validation is not None and spec.dataset.validation.uri is not None:
        yield "spec.dataset.validation.uri", spec.dataset.validation.uri
    if spec.strategy.select is not None and spec.strategy.select.angle is not None:
        yield ANGLE, spec.strategy.select.angle.from_


def named(raw: Object) -> Named:
    """What matters of a FineTuneJob as the API server has it."""
    spec, status = raw.get("spec") or {}, raw.get("status") or {}
    output = status.get("output") or {}
    return Named(
        phase=_text(status, "phase"),
        reason=_text(status, "reason"),
        message=_text(status, "message"),
        strategy=_text(spec, "strategy", "type"),
        merge=(spec.get("output") or {}).get("merge") is True,
        uri=_text(spec, "output", "uri").rstrip("/"),
        delivered=_text(output, "uri"),
        kind=_text(output, "kind"),
        names=tuple(uri.removeprefix(SCHEME) for uri in _named_in(spec) if uri.startswith(SCHEME)),
    )


def _named_in(spec: Mapping[str, Any]) -> tuple[str, str]:
    return _text(spec, "model", "uri"), _text(spec, "strategy", "select", "angle", "from")


def _text(value: Mapping[str, Any], *way: str) -> str:
    """The text at the end of a way through objects, or an empty one."""
    found: Any = value
    for step in way:
        found = found.get(step) if isinstance(found, dict) else None
    return found if isinstance(found, str) else ""
