"""What trainers warn of: kept in status, and told by one event each, so that it outlives the pod that said it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from finetune_api.contract import MAX_WARNING, MAX_WARNINGS
from finetune_api.status import FineTuneJobStatus
from finetune_operator.failures import termination_message
from finetune_operator.lifecycle.decision import Decision, Notice
from finetune_operator.observed import Observed, current_pods


def with_warnings(status: FineTuneJobStatus, observed: Observed) -> FineTuneJobStatus:
    """The status with what the present attempt has warned of by now."""
    heard = list(dict.fromkeys(text[:MAX_WARNING] for text in _heard(status, observed)))[-MAX_WARNINGS:]
    if set(heard) <= set(status.warnings):
        return status
    others = [text for text in status.warnings if text not in heard]
    return status.model_copy(update={"warnings": [*others, *heard][-MAX_WARNINGS:]})


def with_notices(decision: Decision, before: FineTuneJobStatus) -> Decision:
    """The decision with an event for each warning that the status as it was written last does not have."""
    new = (text for text in decision.status.warnings if text not in before.warnings)
    notices = tuple(Notice("TrainerWarning", text, warning=True) for text in new)
    return replace(decision, events=(*notices, *decision.events))


def _heard(status: FineTuneJobStatus, observed: Observed) -> Iterator[str]:
    progress = observed.progress
    if progress is not None and progress.attempt == status.attempt:
        yield from progress.warnings
    for pod in current_pods(observed):
        word = termination_message(pod)
        yield from word.warnings if word is not None else ()
