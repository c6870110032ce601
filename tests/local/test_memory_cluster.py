"""The in-memory API server behaves as a real one where the product relies on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.scripted import Clock

from finetune_operator.cluster.memory import Change, MemoryCluster
from finetune_operator.cluster.port import (
    CONFIG_MAP,
    EVENT,
    FINE_TUNE_JOB,
    JOB,
    POD,
    ConflictError,
    InvalidError,
    Key,
    Object,
)
from finetune_operator.cluster.statefile import StateFile

KEY = Key("default", "tune")


def make_cluster(**options: object) -> MemoryCluster:
    return MemoryCluster(clock=Clock(), admit=lambda new, old: new, **options)  # type: ignore[arg-type]


def fine_tune_job(**spec: object) -> Object:
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "tune"}, "spec": spec}


def config_map(**fields: object) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "tune"}, "data": {"a": "1"}, **fields}


def job(suspend: bool = False) -> Object:
    template = {
        "metadata": {"annotations": {"attempt": "1"}},
        "spec": {"containers": [{"name": "trainer", "image": "a"}]},
    }
    spec = {"suspend": suspend, "completions": 1, "template": template}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "tune"}, "spec": spec}


def owned_by(owner: Object, obj: Object) -> Object:
    reference = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": owner["metadata"]["name"]}
    obj["metadata"]["ownerReferences"] = [{**reference, "uid": owner["metadata"]["uid"]}]
    return obj


def pod(name: str = "tune") -> Object:
    spec = {"containers": [{"name": "trainer"}], "terminationGracePeriodSeconds": 120}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


async def test_a_new_object_gets_what_only_the_server_gives() -> None:
    created = await make_cluster().create(fine_tune_job())
    assert created["metadata"]["namespace"] == "default"
    assert created["metadata"]["creationTimestamp"] == "2026-01-01T12:00:00Z"
    assert created["metadata"]["generation"] == 1
    assert created["metadata"]["uid"]
    assert created["metadata"]["resourceVersion"] == "1"


async def test_a_name_that_is_taken_is_a_conflict() -> None:
    cluster = make_cluster()
    await cluster.create(fine_tune_job())
    with pytest.raises(ConflictError, match='FineTuneJob "tune" already exists'):
        await cluster.create(fine_tune_job())


async def test_what_is_read_is_a_copy() -> None:
    cluster = make_cluster()
    await cluster.create(fine_tune_job(a=[1]))
    read = await cluster.read(FINE_TUNE_JOB, KEY)
    assert read is not None
    read["spec"]["a"].append(2)
    again = await cluster.read(FINE_TUNE_JOB, KEY)
    assert again is not None
    assert again["spec"] == {"a": [1]}


async def test_admission_sees_the_new_and_the_old_object_and_may_refuse() -> None:
    seen: list[tuple[object, object]] = []

    def admit(new: Object, old: Object | None) -> Object:
        seen.append((new["spec"], old and old["spec"]))
        if new["spec"].get("epochs") == -1:
            raise InvalidError("epochs must be positive")
        return {**new, "spec": {"defaulted": True, **new["spec"]}}

    cluster = MemoryCluster(clock=Clock(), admit=admit)
    created = await cluster.create(fine_tune_job(epochs=1))
    assert created["spec"] == {"defaulted": True, "epochs": 1}
    with pytest.raises(InvalidError, match="must be positive"):
        await cluster.patch(FINE_TUNE_JOB, KEY, [{"op": "replace", "path": "/spec/epochs", "value": -1}])
    assert seen[-1] == ({"defaulted": True, "epochs": -1}, {"defaulted": True, "epochs": 1})
    unchanged = await cluster.read(FINE_TUNE_JOB, KEY)
    assert unchanged == created


async def test_a_status_in_a_new_job_is_dropped() -> None:
    created = await make_cluster().create({**fine_tune_job(), "status": {"phase": "Succeeded"}})
    assert "status" not in created


async def test_a_status_patch_leaves_the_spec_and_its_generation_alone() -> None:
    cluster = make_cluster()
    await cluster.create(fine_tune_job(a=1))
    patch = [
        {"op": "add", "path": "/status", "value": {"phase": "Running"}},
        {"op": "replace", "path": "/spec/a", "value": 2},
    ]
    after = await cluster.patch(FINE_TUNE_JOB, KEY, patch, "status")
    assert after is not None
    assert (after["spec"], after["status"]) == ({"a": 1}, {"phase": "Running"})
    assert after["metadata"]["generation"] == 1
    assert after["metadata"]["resourceVersion"] == "2"


async def test_a_spec_patch_leaves_the_status_alone_and_raises_the_generation() -> None:
    cluster = make_cluster()
    await cluster.create(fine_tune_job(a=1))
    patch = [
        {"op": "add", "path": "/status", "value": {"phase": "Succeeded"}},
        {"op": "replace", "path": "/spec/a", "value": 2},
    ]
    after = await cluster.patch(FINE_TUNE_JOB, KEY, patch)
    assert after is not None
    assert after["spec"] == {"a": 2}
    assert "status" not in after
    assert after["metadata"]["generation"] == 2


async def test_a_failed_test_is_a_conflict_and_changes_nothing() -> None:
    cluster = make_cluster()
    created = await cluster.create(fine_tune_job(a=1))
    patch = [
        {"op": "replace", "path": "/spec/a", "value": 2},
        {"op": "test", "path": "/metadata/uid", "value": "another"},
    ]
    with pytest.raises(ConflictError, match="test"):
        await cluster.patch(FINE_TUNE_JOB, KEY, patch)
    assert await cluster.read(FINE_TUNE_JOB, KEY) == created


async def test_a_path_that_does_not_exist_is_invalid() -> None:
    cluster = make_cluster()
    await cluster.create(fine_tune_job())
    with pytest.raises(InvalidError):
        await cluster.patch(FINE_TUNE_JOB, KEY, [{"op": "replace", "path": "/spec/a/b", "value": 2}])


async def test_a_patch_of_what_is_gone_is_none() -> None:
    assert await make_cluster().patch(FINE_TUNE_JOB, KEY, []) is None


async def test_a_write_without_a_difference_makes_no_version_and_no_change() -> None:
    cluster = make_cluster()
    created = await cluster.create(fine_tune_job(a=1))
    changes: list[Change] = []
    cluster.subscribe(changes.append)
    after = await cluster.patch(FINE_TUNE_JOB, KEY, [{"op": "replace", "path": "/spec/a", "value": 1}])
    assert after == created
    assert changes == []


async def test_apply_creates_and_then_merges() -> None:
    cluster = make_cluster()
    await cluster.apply({**config_map(), "metadata": {"name": "tune", "labels": {"a": "1"}}})
    await cluster.apply({**config_map(data={"b": "2"}), "metadata": {"name": "tune", "labels": {"b": "2"}}})
    after = await cluster.read(CONFIG_MAP, KEY)
    assert after is not None
    assert after["metadata"]["labels"] == {"a": "1", "b": "2"}
    assert after["data"] == {"a": "1", "b": "2"}


async def test_apply_with_a_uid_never_makes_an_object_anew() -> None:
    cluster = make_cluster()
    with pytest.raises(ConflictError, match="gone"):
        await cluster.apply({**config_map(), "metadata": {"name": "tune", "uid": "old"}})
    await cluster.create(config_map())
    with pytest.raises(ConflictError, match="uid"):
        await cluster.apply({**config_map(), "metadata": {"name": "tune", "uid": "old"}})


async def test_an_outdated_resource_version_is_a_conflict() -> None:
    cluster = make_cluster()
    created = await cluster.create(config_map())
    await cluster.apply(config_map(data={"a": "2"}))
    with pytest.raises(ConflictError, match="resourceVersion"):
        await cluster.apply(created)


async def test_an_immutable_config_map_keeps_its_data() -> None:
    cluster = make_cluster()
    await cluster.create(config_map(immutable=True))
    with pytest.raises(InvalidError, match="field is immutable"):
        await cluster.apply(config_map(immutable=True, data={"a": "2"}))


ATTEMPT = {"op": "replace", "path": "/spec/template/metadata/annotations/attempt", "value": "2"}
IMAGE = {"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "b"}


async def test_the_template_of_a_suspended_job_takes_annotations_in_the_patch_that_resumes_it() -> None:
    cluster = make_cluster()
    await cluster.create(job(suspend=True))
    after = await cluster.patch(JOB, KEY, [ATTEMPT, {"op": "replace", "path": "/spec/suspend", "value": False}])
    assert after is not None
    assert after["spec"]["template"]["metadata"]["annotations"] == {"attempt": "2"}


@pytest.mark.parametrize(
    ("suspend", "status", "patch"),
    [
        pytest.param(False, None, ATTEMPT, id="a job that runs"),
        pytest.param(
            True, {"startTime": "2026-01-01T12:00:00Z"}, ATTEMPT, id="a suspended job that is not yet stopped"
        ),
        pytest.param(True, None, IMAGE, id="the image of a suspended job"),
    ],
)
async def test_else_the_template_is_immutable(suspend: bool, status: Object | None, patch: Object) -> None:
    cluster = make_cluster()
    await cluster.create(job(suspend))
    if status:
        cluster.set_status(JOB, KEY, status)
    with pytest.raises(InvalidError, match=r"spec\.template: Invalid value: field is immutable"):
        await cluster.patch(JOB, KEY, [patch])


async def test_the_number_of_pods_of_a_job_is_immutable() -> None:
    cluster = make_cluster()
    await cluster.create(job())
    with pytest.raises(InvalidError, match=r"spec\.completions"):
        await cluster.patch(JOB, KEY, [{"op": "replace", "path": "/spec/completions", "value": 2}])


async def test_lists_select_by_label_and_namespace() -> None:
    cluster = make_cluster()
    for name, labels in (("a", {"job": "x"}), ("b", {"job": "y"}), ("c", {})):
        await cluster.create({**config_map(), "metadata": {"name": name, "labels": labels}})

    async def names(namespace: str | None, labels: dict[str, str]) -> list[str]:
        return [item["metadata"]["name"] for item in await cluster.list(CONFIG_MAP, namespace, labels)]

    assert await names("default", {"job": "x"}) == ["a"]
    assert await names(None, {"job": ""}) == ["a", "b"]
    assert await names("default", {}) == ["a", "b", "c"]
    assert await names("other", {}) == []


async def test_delete_spares_another_incarnation() -> None:
    cluster = make_cluster()
    created = await cluster.create(config_map())
    await cluster.delete(CONFIG_MAP, KEY, "another")
    assert await cluster.read(CONFIG_MAP, KEY) == created
    await cluster.delete(CONFIG_MAP, KEY, created["metadata"]["uid"])
    assert await cluster.read(CONFIG_MAP, KEY) is None
    await cluster.delete(CONFIG_MAP, KEY, created["metadata"]["uid"])


async def test_dependents_go_with_their_owner_and_pods_end_gracefully() -> None:
    cluster = make_cluster()
    owner = await cluster.create(fine_tune_job())
    child = await cluster.create(owned_by(owner, job()))
    await cluster.create(owned_by(owner, config_map()))
    await cluster.create(owned_by(child, pod()))
    cluster.bind(KEY, "node")
    await cluster.delete(FINE_TUNE_JOB, KEY, owner["metadata"]["uid"])
    assert await cluster.read(JOB, KEY) is None
    assert await cluster.read(CONFIG_MAP, KEY) is None
    left = await cluster.read(POD, KEY)
    assert left is not None
    assert left["metadata"]["deletionTimestamp"] == "2026-01-01T12:02:00Z"
    cluster.set_status(POD, KEY, {"phase": "Failed"})
    assert await cluster.read(POD, KEY) is None


async def test_what_is_created_for_an_owner_that_is_gone_is_collected() -> None:
    cluster = make_cluster()
    owner = await cluster.create(fine_tune_job())
    await cluster.delete(FINE_TUNE_JOB, KEY, owner["metadata"]["uid"])
    await cluster.create(owned_by(owner, config_map()))
    assert await cluster.read(CONFIG_MAP, KEY) is None


async def test_a_pod_with_a_finalizer_waits_for_it() -> None:
    cluster = make_cluster()
    created = await cluster.create({**pod(), "metadata": {"name": "tune", "finalizers": ["keep"]}})
    await cluster.delete(POD, KEY, created["metadata"]["uid"], 0)
    assert await cluster.read(POD, KEY) is not None
    cluster.release(KEY, "keep")
    assert await cluster.read(POD, KEY) is None


async def test_a_pod_without_a_node_goes_at_once_and_a_running_one_by_force() -> None:
    cluster = make_cluster()
    for name in ("never-started", "running"):
        created = await cluster.create(pod(name))
        if name == "running":
            cluster.bind(Key("default", name), "node")
        await cluster.delete(POD, Key("default", name), created["metadata"]["uid"])
    (left,) = await cluster.list(POD, None, {})
    assert left["metadata"]["name"] == "running"
    await cluster.delete(POD, Key("default", "running"), left["metadata"]["uid"], 0)
    assert await cluster.list(POD, None, {}) == []


async def test_subscribers_hear_of_every_change_with_the_object() -> None:
    cluster = make_cluster()
    heard: list[Change] = []
    cluster.subscribe(heard.append)
    created = await cluster.create(fine_tune_job(a=1))
    await cluster.patch(FINE_TUNE_JOB, KEY, [{"op": "replace", "path": "/spec/a", "value": 2}])
    await cluster.delete(FINE_TUNE_JOB, KEY, created["metadata"]["uid"])
    told = [(change.type, change.kind, change.key, change.obj["spec"]["a"]) for change in heard]
    assert told == [
        ("ADDED", FINE_TUNE_JOB, KEY, 1),
        ("MODIFIED", FINE_TUNE_JOB, KEY, 2),
        ("DELETED", FINE_TUNE_JOB, KEY, 2),
    ]


async def test_equal_events_are_counted_and_different_ones_are_kept_apart() -> None:
    cluster = make_cluster()
    owner = await cluster.create(fine_tune_job())
    for message in ("a", "b", "a"):
        await cluster.emit(owner, "Started", message)
    events = await cluster.list(EVENT, "default", {})
    assert sorted((event["message"], event["count"]) for event in events) == [("a", 2), ("b", 1)]


async def test_the_state_outlives_its_process(tmp_path: Path) -> None:
    path = tmp_path / "state" / "objects.json"
    first = make_cluster(state=StateFile(path))
    created = await first.create(fine_tune_job(a=1))
    second = make_cluster(state=StateFile(path))
    assert await second.read(FINE_TUNE_JOB, KEY) == created
    other = await second.create(config_map())
    assert int(other["metadata"]["resourceVersion"]) > int(created["metadata"]["resourceVersion"])
    assert json.loads(path.read_text())["version"] == 2
