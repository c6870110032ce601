"""Every way in which a spec is refused, and that no rule of the CRD is without its case."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from finetune_api.crd import job_schema
from finetune_api.pairs import ALLOWED
from finetune_api.schema import RULES, Schema
from finetune_api.strategy import StrategyType
from finetune_api.task import SUPERVISED, TaskType
from finetune_operator.cluster.port import InvalidError
from finetune_operator.validation import admit, validate
from tests.api.jobs import FULLS, changed, job_of, minimal
from tests.api.refusals import BY_BOUND, BY_RULE, REFUSALS, UNSUPPORTED, Refusal


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_a_bad_spec_is_refused_for_this_reason_and_no_other(refusal: Refusal) -> None:
    with pytest.raises(InvalidError) as caught:
        admit(refusal.job)
    name = refusal.job["metadata"]["name"]
    assert str(caught.value) == f'FineTuneJob.finetune.dev "{name}" is invalid: {refusal.says}'
    assert [str(problem) for problem in validate(refusal.job)] == [refusal.says]


@pytest.mark.parametrize("refusal", BY_BOUND, ids=lambda refusal: refusal.name)
def test_what_lies_beyond_a_bound_is_refused(refusal: Refusal) -> None:
    assert refusal.says in {str(problem) for problem in validate(refusal.job)}


@pytest.mark.parametrize("task", SUPERVISED)
@pytest.mark.parametrize("strategy", StrategyType)
def test_every_strategy_goes_with_every_task_or_is_refused_with_the_reason(
    strategy: StrategyType, task: TaskType
) -> None:
    found = [str(problem) for problem in validate(job_of(strategy, task))]
    if (strategy, task) in ALLOWED:
        assert found == []
    else:
        assert found in [[refusal.says] for refusal in BY_RULE if refusal.name == f"{strategy.value} on images"]


def test_all_problems_are_told_at_once() -> None:
    bad = changed(minimal(), {"spec.hyperparameters.epochs": -1, "spec.resources.memory": "16GB"})
    with pytest.raises(InvalidError) as caught:
        admit(bad)
    assert str(caught.value) == (
        'FineTuneJob.finetune.dev "small" is invalid: [spec.hyperparameters.epochs: Invalid value: -1: '
        "spec.hyperparameters.epochs in body should be greater than 0, spec.resources.memory: Invalid value: "
        '"16GB": must be a quantity above 0, such as 2, 500m, 16Gi or 1.5T]'
    )


def test_rules_are_not_asked_where_types_are_wrong() -> None:
    bad = changed(minimal(), {"spec.hyperparameters.epochs": "many", "spec.resources.memory": "16GB"})
    assert [problem.path for problem in validate(bad)] == ["spec.hyperparameters.epochs"]


@pytest.mark.parametrize("job", [minimal(), *FULLS.values()], ids=["minimal", *FULLS])
def test_a_good_spec_is_admitted(job: dict[str, object]) -> None:
    assert validate(job) == []
    admit(job)


def test_no_rule_is_without_a_case() -> None:
    fired = {refusal.says for refusal in (*BY_RULE, *UNSUPPORTED)}
    rules = {rule["message"] for rule in _rules(job_schema()) if "oldSelf" not in rule["rule"]}
    untested = {message for message in rules if not any(says.endswith(message) for says in fired)}
    assert untested == set()


def _rules(schema: Schema) -> Iterator[dict[str, str]]:
    yield from schema.get(RULES, [])
    children = [schema.get("items"), schema.get("additionalProperties"), *schema.get("properties", {}).values()]
    for child in children:
        yield from _rules(child) if child else ()
