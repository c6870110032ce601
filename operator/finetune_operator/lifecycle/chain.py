"""Jobs that begin with what other jobs deliver: held until those have succeeded, then fixed to what they have written.

What was found is written into status before anything is created, so that neither a restart nor a job of the same name
that comes later changes what an attempt is made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finetune_api.status import Phase
from finetune_api.strategy import ADAPTERS
from finetune_operator.lifecycle.decision import Decision, Notice, Situation
from finetune_operator.references import MODEL, Named, Reference, pending

WAITING = "WaitingForJob"
HOPELESS = (
    *("ReferencedJobMissing", "ReferencedJobFailed", "ReferencedJobBlocked", "ReferencedJobHasNoModel"),
    "CircularReference",
)
"""Reasons for which a job stays blocked until a person does something."""
MERGEABLE = frozenset(strategy.value for strategy in ADAPTERS)
WITHOUT_MODEL = MERGEABLE | {"Adapter", "PromptTuning", "PrefixTuning"}
"""Strategies that deliver what belongs beside a model: told before their hours of training, not after."""


@dataclass(frozen=True)
class Hold:
    """Why a reference cannot be followed yet."""

    reason: str
    message: str


def await_named(situation: Situation) -> Decision | None:
    """Blocked until all jobs that are named have succeeded; then their places, once and for all."""
    wanted = pending(situation.job)
    if not wanted:
        return None
    holds = [hold for reference in wanted if (hold := _hold(situation, reference)) is not None]
    if not holds:
        return _found(situation, wanted)
    # What only a person can change is told first.
    worst = next((hold for hold in holds if hold.reason in HOPELESS), holds[0])
    news = worst.reason in HOPELESS and worst.reason != situation.status.reason
    events = (Notice(worst.reason, worst.message, warning=True),) if news else ()
    return Decision(situation.to(Phase.BLOCKED, worst.reason, worst.message), events=events)


def _found(situation: Situation, wanted: tuple[Reference, ...]) -> Decision:
    found = {reference.field: _place(reference, situation.observed.named[reference.job]) for reference in wanted}
    places = {field: place for field, place in found.items() if place is not None}
    text = "; ".join(f"{reference.field} is {places[reference.field]}, of job {reference.job}" for reference in wanted)
    known = {**situation.status.references, **places}
    status = situation.to(Phase.STARTING, "ReferencesFound", text, references=known)
    return Decision(status, requeue_after=0.0)


def _hold(situation: Situation, reference: Reference) -> Hold | None:
    """None: what the field needs is there."""
    other = situation.observed.named.get(reference.job)
    if other is None:
        namespace = situation.job.metadata.namespace
        text = f"there is no FineTuneJob {reference.job} in namespace {namespace}; create it"
        return Hold("ReferencedJobMissing", f"{reference.field}: {text}")
    hopeless = _hopeless(situation, reference, other)
    if hopeless is not None or other.phase == Phase.SUCCEEDED:
        return hopeless
    return Hold(WAITING, f"Waiting for job {reference.job} ({reference.field}), which is {other.phase or 'new'}")


def _hopeless(situation: Situation, reference: Reference, other: Named) -> Hold | None:
    """Why the other job will never be what the field needs, as it is now."""
    field, who = reference.field, f"job {reference.job}"
    if circle := _circle(situation.job.metadata.name, reference.job, situation.observed.named):
        text = f"{field}: these jobs wait for each other: {' -> '.join(circle)}; delete one of them"
        return Hold("CircularReference", text)
    if other.phase == Phase.FAILED:
        text = f"{field}: {who} has failed ({other.message}); delete it and create it anew"
        return Hold("ReferencedJobFailed", text)
    if other.phase == Phase.BLOCKED and other.reason in HOPELESS:
        text = f"{field}: {who} cannot start itself ({other.reason}); its own status says why"
        return Hold("ReferencedJobBlocked", text)
    if _place(reference, other) is None:
        needs = "a job goes on from a whole model only" if field == MODEL else "angles are those of a whole model"
        way_out = "with output.merge: true" if other.strategy in MERGEABLE else "with a strategy that trains the model"
        text = f"{field}: {who} delivers an adapter, and {needs}; create it anew {way_out}, or name another"
        return Hold("ReferencedJobHasNoModel", text)
    return None


def _place(reference: Reference, other: Named | None) -> str | None:
    """Where a job has delivered, or will, what the field asks of it; None where it delivers no such thing."""
    if other is None:
        return None
    model = f"{other.uri}/model"
    if other.kind == "adapter" or (not other.kind and other.strategy in WITHOUT_MODEL):
        # The report of an adapter has no angles, but the merged model has them.
        return model if other.merge else None
    if reference.field != MODEL:
        return f"{other.uri}/report/angles.json"
    return other.delivered or model


def _circle(start: str, first: str, known: Mapping[str, Named | None]) -> list[str]:
    """The jobs by which a job waits for itself, beginning and ending with it; empty where they are not known."""
    ways: list[list[str]] = [[start, first]]
    seen = {first}
    while ways:
        way = ways.pop(0)
        other = known.get(way[-1])
        for name in other.names if other is not None and other.is_held else ():
            if name == start:
                return [*way, start]
            if name not in seen:
                seen.add(name)
                ways.append([*way, name])
    return []
