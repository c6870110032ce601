"""What people write: misspelt names, lines, and keys that stand twice."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from finetune_operator.validation import Problem, validate
from tests.api.jobs import REMOVED, changed, minimal

TEXT = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata:
  name: small
spec:
  task: {type: Instruction}
  model:
    uri: s3://models/base
  dataset:
    uri: s3://data/rows.jsonl
  strategy:
    type: LoRA
  output:
    uri: s3://models/out
"""


def judged(text: str) -> list[Problem]:
    return validate(yaml.safe_load(text), yaml.compose(text))


def lines(text: str) -> list[tuple[int | None, str]]:
    return [(problem.line, problem.path) for problem in judged(text)]


def test_a_good_document_has_no_problems() -> None:
    assert judged(TEXT) == []


@pytest.mark.parametrize(
    ("added", "line", "path"),
    [
        ("  hyperparameters:\n    seed: 1\n    epochs: -1\n", 17, "spec.hyperparameters.epochs"),
        ("  hyperparameters: {seed: 1, epochs: -1}\n", 15, "spec.hyperparameters.epochs"),
        ("  checkpoint:\n    kep: 3\n", 16, "spec.checkpoint.kep"),
        ("  podTemplate:\n    env:\n    - name: A\n    - name: B-C\n", 18, "spec.podTemplate.env[1].name"),
        ("  podTemplate:\n    env:\n    - name: A\n    - value: x\n", 18, "spec.podTemplate.env[1].name"),
        ("  strategy:\n    type: LoRA\n", 15, "spec.strategy"),
    ],
    ids=["block", "flow", "unknown", "list", "missing: where it should stand", "twice: the second one"],
)
def test_a_problem_has_the_line_of_its_field(added: str, line: int, path: str) -> None:
    assert lines(TEXT + added) == [(line, path)]


def test_what_is_missing_has_the_line_of_its_parent() -> None:
    assert lines(TEXT.replace("    type: LoRA\n", "    lora: {}\n")) == [(11, "spec.strategy.type")]
    assert lines(TEXT.replace("  output:\n    uri: s3://models/out\n", "")) == [(5, "spec.output")]


def test_a_rule_about_a_field_has_the_line_of_that_field() -> None:
    text = TEXT.replace("type: LoRA\n", "type: Full\n    lora:\n      rank: 4\n")
    assert lines(text) == [(13, "spec.strategy.lora")]


def test_problems_come_in_the_order_of_their_lines() -> None:
    text = TEXT.replace("s3://models/base", "models/base") + "  epochs: 3\n  checkpoint: {keep: 0}\n"
    assert lines(text) == [(8, "spec.model.uri"), (15, "spec.epochs"), (16, "spec.checkpoint.keep")]


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("spec.hyperparameters.epoch", "; did you mean epochs?"),
        ("spec.hyperparameters.learning_rate", "; did you mean learningRate?"),
        ("spec.hyperparameters.perdevicebatchsize", "; did you mean perDeviceBatchSize?"),
        (
            "spec.strategy.lora.r",
            "; there are alpha, doRA, dropout, modulesToSave, rank, rankPattern, rsLoRA, targetModules",
        ),
        ("spec.strategy.lora.rslora", "; did you mean rsLoRA?"),
        ("spec.epochs", "; did you mean spec.hyperparameters.epochs?"),
        ("spec.strategy.unfreeze", "; did you mean unfreezing?"),
        ("spec.strategy.prompttuning", "; did you mean promptTuning?"),
        ("spec.strategy.fisher", "; did you mean spec.strategy.select.fisher?"),
        ("spec.strategy.target", "; did you mean spec.strategy.green.target?"),
        ("spec.hyperparameters.layer_decay", "; did you mean layerDecay?"),
        ("spec.hyperparameters.patience", "; did you mean spec.evaluation.earlyStopping.patience?"),
        ("spec.task.label", "; did you mean labels?"),
        ("spec.dataset.column", "; did you mean columns?"),
        ("spec.output.weight", "; did you mean weights?"),
        ("spec.learning_rate", "; did you mean spec.hyperparameters.learningRate?"),
        ("spec.hyperparameter", "; did you mean hyperparameters?"),
        ("spec.podTemplate.annotation", "; did you mean annotations?"),
        ("metadata.label", "; did you mean labels?"),
        ("specs", "; did you mean spec?"),
    ],
)
def test_an_unknown_field_is_told_with_the_nearest_name(path: str, hint: str) -> None:
    found = validate(changed(minimal(), {path: 3}))
    assert [str(problem) for problem in found] == [f'unknown field "{path}"{hint}']


def test_a_key_that_stands_twice_is_told_since_yaml_loses_one() -> None:
    assert [str(problem) for problem in judged(TEXT + "  suspend: true\n  suspend: false\n")] == [
        'spec.suspend: key "suspend" is set twice; remove one of them'
    ]


def test_names_that_yaml_takes_for_something_else_are_names() -> None:
    added = "  podTemplate:\n    labels: {1: a, true: b}\n  scheduling:\n    2: x\n"
    assert [(problem.line, str(problem).split(";")[0]) for problem in judged(TEXT + added)] == [
        (18, 'unknown field "spec.scheduling.2"')
    ]


def test_a_generated_name_is_judged_with_what_the_server_adds() -> None:
    def said(prefix: str) -> list[str]:
        return [str(problem) for problem in validate(changed(minimal(), {"metadata": {"generateName": prefix}}))]

    assert said("small-") == []
    assert said("7b-")[0].startswith("metadata.name: Forbidden: the name must start with a small letter")
    assert said("a" * 41) == ["metadata.name: Too long: may not be more than 45 bytes"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"apiVersion": "finetune.dev/v1"}, 'apiVersion: Unsupported value: "finetune.dev/v1": set apiVersion to '),
        ({"kind": "FinetuneJob"}, 'kind: Unsupported value: "FinetuneJob": set kind to FineTuneJob'),
        ({"kind": REMOVED}, "kind: Unsupported value: null: set kind to FineTuneJob"),
        ({"metadata.name": REMOVED}, "metadata.name: Required value: name or generateName is required"),
        ({"metadata": REMOVED}, "metadata.name: Required value: name or generateName is required"),
        (
            {"metadata.labels": {"a": 3}},
            'metadata.labels.a: Invalid value: "integer": metadata.labels.a in body must be',
        ),
        ({"metadata": []}, "metadata.name: Required value"),
        ({"metadata.name": 7}, 'metadata.name: Invalid value: "integer": metadata.name in body must be of type string'),
    ],
)
def test_an_object_that_is_no_fine_tune_job_is_told_so(changes: dict[str, Any], says: str) -> None:
    found = [str(problem) for problem in validate(changed(minimal(), changes))]
    assert len(found) == 1
    assert found[0].startswith(says)
