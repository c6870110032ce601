"""Properties of all jobs, valid and not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finetune_api.crd import job_schema
from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob
from finetune_api.schema import INT_OR_STRING, Schema
from finetune_operator.validation import admit, validate
from tests.api.changes import leaves
from tests.api.jobs import FULLS, changed, minimal
from tests.api.sensible import Object
from tests.api.strategies import SPEC, jobs, unsupported

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PLACES = sorted(
    {(name, path) for name, job in FULLS.items() for path, *_ in leaves(job["spec"], SPEC, "spec")}
    | {(name, f"spec.{field}") for name, job in FULLS.items() for field in job["spec"]}
    | {("a stream", path) for path in ("metadata", "metadata.labels", "spec")}
)
"""Fields, each in a job that has it."""
QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def as_text(job: Object) -> Object:
    """The job with its quantities as the types hold them: `cpu: 2` and `cpu: "2"` are the same."""
    found: Object = _as_text(job["spec"], SPEC)
    return found


def _as_text(value: Any, schema: Schema) -> Any:
    if isinstance(value, dict) and "properties" in schema:
        return {name: _as_text(item, schema["properties"][name]) for name, item in value.items()}
    return str(value) if schema.get(INT_OR_STRING) else value


@QUICK
@given(jobs())
def test_a_sensible_job_is_admitted(job: Object) -> None:
    assert [str(problem) for problem in validate(job)] == []


@QUICK
@given(jobs())
def test_admitting_twice_changes_nothing(job: Object) -> None:
    stored = admit(job)
    assert admit(stored) == stored
    assert admit(job, stored) == stored


@QUICK
@given(jobs())
def test_nothing_is_lost_on_the_way_through_the_types(job: Object) -> None:
    stored = admit(job)
    assert FineTuneJob.from_wire(stored).spec.to_wire() == as_text(stored)


@QUICK
@given(jobs())
def test_what_is_resolved_is_a_valid_job_again(job: Object) -> None:
    resolved = resolve(FineTuneJob.from_wire(admit(job))).to_wire()
    assert [str(problem) for problem in validate({**resolved, "metadata": job["metadata"]})] == []


@settings(QUICK, max_examples=200)
@example(("a stream", "metadata"), {})
@example(("a stream", "metadata"), {"generateName": 3})
@example(("a stream", "spec"), None)
@given(st.sampled_from(PLACES), ANYTHING)
def test_whatever_is_written_is_judged_and_nothing_raises(place: tuple[str, str], value: Any) -> None:
    name, path = place
    validate(changed(FULLS[name], {path: value}))


def test_the_types_and_the_schema_have_the_same_defaults() -> None:
    assert FineTuneJob.from_wire(minimal()).spec.to_wire() == as_text(admit(minimal()))


def test_the_full_jobs_have_every_field_that_is_supported() -> None:
    missing = {path for path in _supported(SPEC, "spec") if not any(_has(job, path) for job in FULLS.values())}
    # Parts of a pod that stand for many.
    assert {path for path in missing if not path.startswith(("spec.scheduling.affinity", "spec.podTemplate"))} == set()


def test_the_full_jobs_have_other_values_than_the_defaults() -> None:
    same = {path for path in _supported(SPEC, "spec") if all(_is_default(job, path) for job in FULLS.values())}
    assert same == set()


def _supported(schema: Schema, path: str) -> Iterator[str]:
    for name, child in schema.get("properties", {}).items():
        if not unsupported(child):
            yield f"{path}.{name}"
            yield from _supported(child, f"{path}.{name}")


def _at(job: Object, path: str) -> tuple[Any, Schema]:
    """The value at a path, None where there is none, and its schema."""
    value, schema = job["spec"], SPEC
    for name in path.split(".")[1:]:
        value = value.get(name) if isinstance(value, dict) else None
        schema = schema["properties"][name]
    return value, schema


def _has(job: Object, path: str) -> bool:
    return _at(job, path)[0] is not None


def _is_default(job: Object, path: str) -> bool:
    value, schema = _at(job, path)
    return "default" in schema and (value is None or value == schema["default"])


def test_absent_options_of_a_union_are_not_defaulted() -> None:
    assert admit(minimal())["spec"]["strategy"] == {"type": "LoRA"}
    given = admit(changed(minimal(), {"spec.strategy.lora": {"rank": 4}}))
    assert given["spec"]["strategy"]["lora"] == {
        **{"rank": 4, "alpha": 32, "dropout": 0.05, "targetModules": ["all-linear"], "modulesToSave": []},
        **{"rankPattern": {}, "rsLoRA": False, "doRA": False},
    }


def test_unknown_fields_and_nulls_are_pruned_as_the_server_does() -> None:
    written = changed(minimal(), {"spec.extra": 1, "spec.checkpoint": None, "spec.podTemplate": None, "more": {}})
    assert admit(written) == admit(minimal())


def test_the_input_is_left_as_it_was() -> None:
    job = minimal()
    admit(job)["spec"]["hyperparameters"]["epochs"] = 99
    assert job == minimal()
    assert admit(minimal())["spec"]["hyperparameters"]["epochs"] == 1
    assert job_schema()["properties"]["spec"]["properties"]["hyperparameters"]["default"]["epochs"] == 1
