"""A job keeps the image that it has begun with, whatever image a newer operator brings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune_operator.cluster.port import JOB, POD, Key
from finetune_operator.settings import Settings
from tests.operator.world import KEY, World, admit_all

REPOSITORY = "registry.example.com:5000/ml/trainer"
OLD, NEW = f"{REPOSITORY}:1", f"{REPOSITORY}:2"
DIGEST = "sha256:" + "a" * 64


async def started() -> World:
    world = World(Settings(trainer_image=OLD), admit=admit_all)
    await world.create()
    await world.settle()
    return world


async def node_tells(world: World, image_id: str) -> None:
    (pod,) = await world.pods()
    patch = [{"op": "add", "path": "/status/containerStatuses/0/imageID", "value": image_id}]
    await world.cluster.patch(POD, Key("ml", pod["metadata"]["name"]), patch, "status")
    await world.settle()


async def upgrade(world: World) -> None:
    world.settings = replace(world.settings, trainer_image=NEW)
    world.engine = world.operator(world.cluster)
    await world.settle()


async def lose_workload(world: World) -> None:
    await world.cluster.delete(JOB, KEY, (await world.workload())["metadata"]["uid"])
    await world.settle()


async def image(world: World) -> str:
    (trainer,) = (await world.workload())["spec"]["template"]["spec"]["containers"]
    return str(trainer["image"])


async def test_an_upgrade_changes_no_job_that_is_under_way() -> None:
    world = await started()
    await upgrade(world)
    await lose_workload(world)
    assert (await world.status())["attempt"] == 2
    assert (await image(world), (await world.status())["trainerImage"]) == (OLD, OLD)


async def test_a_new_job_gets_the_new_image() -> None:
    world = await started()
    await upgrade(world)
    await world.create(name="later")
    key = Key("ml", "later")
    await world.settle(key)
    assert (await world.status(key))["trainerImage"] == NEW


@pytest.mark.parametrize("runtime", ["", "docker-pullable://"])
async def test_it_is_pinned_by_the_digest_that_a_node_has_pulled(runtime: str) -> None:
    world = await started()
    await node_tells(world, f"{runtime}{REPOSITORY}@{DIGEST}")
    await lose_workload(world)
    assert await image(world) == f"{REPOSITORY}@{DIGEST}"
    await node_tells(world, f"{REPOSITORY}@sha256:{'b' * 64}")
    assert (await world.status())["trainerImage"].endswith(DIGEST)


@pytest.mark.parametrize("told", [DIGEST, f"docker.io/library/import-2026-11-28@{DIGEST}"])
async def test_an_image_that_was_loaded_into_the_node_keeps_its_name(told: str) -> None:
    world = await started()
    await node_tells(world, told)
    assert (await world.status())["trainerImage"] == OLD


async def test_the_library_of_the_default_registry_goes_without_saying() -> None:
    world = World(Settings(trainer_image="trainer:1"), admit=admit_all)
    await world.create()
    await world.settle()
    await node_tells(world, f"docker.io/library/trainer@{DIGEST}")
    assert (await world.status())["trainerImage"] == f"trainer@{DIGEST}"


async def test_one_that_is_installed_by_digest_stays_as_it_is() -> None:
    world = World(Settings(trainer_image=f"t@{DIGEST}"), admit=admit_all)
    await world.create()
    await world.settle()
    await node_tells(world, f"t@sha256:{'b' * 64}")
    assert (await world.status())["trainerImage"] == f"t@{DIGEST}"
