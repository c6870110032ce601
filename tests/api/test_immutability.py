"""After creation nothing of the spec changes but what is meant to, whichever way it is tried."""

from __future__ import annotations

import pytest

from finetune_api.crd import job_schema
from finetune_api.schema import RULES
from finetune_operator.cluster.port import InvalidError
from finetune_operator.validation import admit, validate_update
from tests.api.changes import CHANGES, Change
from tests.api.jobs import REMOVED, changed, minimal


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_only_what_may_change_can_change(change: Change) -> None:
    found = [str(problem) for problem in validate_update(change.before, change.after)]
    assert bool(found) == change.refused
    assert not change.refused or any("cannot be changed after creation" in words for words in found)


def test_the_refusal_names_the_field_and_the_way_out() -> None:
    stored = admit(minimal())
    with pytest.raises(InvalidError) as caught:
        admit(changed(stored, {"spec.hyperparameters.epochs": 3}), stored)
    assert str(caught.value) == (
        'FineTuneJob.finetune.dev "small" is invalid: spec.hyperparameters: Forbidden: hyperparameters cannot be '
        "changed "
        "after creation; delete the job and create it anew"
    )


def test_the_spec_as_a_whole_cannot_be_removed() -> None:
    stored = admit(minimal())
    with pytest.raises(InvalidError, match="spec: Required value"):
        admit(changed(stored, {"spec": REMOVED}), stored)


def test_writing_a_default_out_changes_nothing() -> None:
    stored = admit(minimal())
    assert admit(minimal(), stored) == stored
    assert admit(stored, minimal()) == stored


def test_every_field_of_the_spec_is_either_fixed_by_a_rule_or_meant_to_change() -> None:
    spec = job_schema()["properties"]["spec"]
    fixed = {rule["fieldPath"].split(".")[1] for rule in spec[RULES] if "oldSelf" in rule["rule"]}
    assert fixed == spec["properties"].keys() - {"suspend"}
