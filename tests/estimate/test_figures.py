"""Sums that can be done by hand: GPUs, optimizers, shards, traffic, checkpoints, and Auto."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.hyperparameters import Optimizer
from finetune_api.run import Sharding
from finetune_trainer.estimate.course import END, FORWARD, Gathering, Point, highest
from finetune_trainer.estimate.figures import ROOT, Held, Memory, checkpoint, state, traffic
from finetune_trainer.estimate.gpus import GB, MIB, gpu_of
from finetune_trainer.estimate.optimizers import State, state_bytes
from finetune_trainer.estimate.sharding import choose_sharding
from tests.estimate.jobs import of


@pytest.mark.parametrize(
    ("product", "mib"),
    [
        ("NVIDIA-A100-SXM4-40GB", 40_960),
        ("NVIDIA-A100-SXM4-80GB", 81_920),
        ("NVIDIA-A100-80GB-PCIe", 81_920),
        ("NVIDIA-H100-80GB-HBM3", 81_559),
        ("NVIDIA-H100-PCIe", 81_559),
        ("NVIDIA-H100-NVL", 95_830),
        ("NVIDIA-H200", 143_771),
        ("NVIDIA-B200", 183_359),
        ("NVIDIA-GH200-480GB", 97_871),
        ("NVIDIA-L4", 23_034),
        ("NVIDIA-L4-SHARED", 23_034),
        ("NVIDIA-L40S", 46_068),
        ("NVIDIA-A10G", 23_028),
        ("NVIDIA-GeForce-RTX-4090", 24_564),
        ("Tesla-T4", 15_360),
        ("Tesla-V100-SXM2-16GB", 16_384),
        ("Tesla-V100-SXM2-32GB", 32_768),
    ],
)
def test_labels_of_gpus_tell_their_memory(product: str, mib: int) -> None:
    gpu = gpu_of(product)
    assert gpu is not None
    assert gpu.memory == mib * MIB
    assert gpu.bfloat16 is not product.startswith("Tesla")


def test_slices_and_unknown_products_have_what_their_names_tell() -> None:
    assert gpu_of("NVIDIA-A100-SXM4-80GB-MIG-3g.40gb").memory == 40 * GB
    assert gpu_of("NVIDIA-X900-96GB").memory == 96 * GB
    assert gpu_of("AMD-Instinct") is None
    assert gpu_of(None) is None


@pytest.mark.parametrize(
    ("optimizer", "shape", "state"),
    [
        (Optimizer.ADAMW, (100, 10), State(8_000)),
        (Optimizer.ADAMW_8BIT, (1024, 1024), State(2 * (2**20 + 4 * 2**12 + 1024))),
        (Optimizer.ADAMW_8BIT, (4095,), State(8 * 4095)),
        (Optimizer.PAGED_ADAMW_8BIT, (1024, 1024), State(0, 2 * (2**20 + 4 * 2**12 + 1024))),
        (Optimizer.PAGED_ADAMW_8BIT, (256, 256), State(2 * (2**16 + 4 * 2**8 + 1024))),
        (Optimizer.ADAFACTOR, (100, 10), State(4 * 110)),
        (Optimizer.ADAFACTOR, (3, 100, 10), State(4 * 3 * 110)),
        (Optimizer.ADAFACTOR, (100,), State(400)),
        (Optimizer.SGD, (100, 10), State(0)),
    ],
)
def test_an_optimizer_holds_so_much(optimizer: Optimizer, shape: tuple[int, ...], state: State) -> None:
    assert state_bytes(optimizer, shape) == state


def test_moments_of_an_embedding_stay_in_32_bits() -> None:
    assert state_bytes(Optimizer.ADAMW_8BIT, (1024, 1024), embedding=True) == State(8 * 2**20)


FROZEN = Held("base", (1000, 10), whole=10_000, itemsize=2, learns=False, unit="block", extra=64)
LEARNING = Held("new", (50, 10), whole=1_000, itemsize=4, learns=True, unit="block")


def test_what_is_frozen_has_neither_gradients_nor_moments() -> None:
    assert state([FROZEN, LEARNING], Optimizer.ADAMW) == (20_064 + 2_000, 2_000, 4_000, 0)
    assert checkpoint([FROZEN, LEARNING], Optimizer.ADAMW).total == 2_000 + 4_000


def test_replicas_exchange_gradients_once_and_shards_all_parameters_in_each_pass() -> None:
    replicated = traffic([FROZEN, LEARNING], Sharding.DDP, 4, 8, itemsize=2)
    assert (replicated.all_reduce, replicated.total) == (2 * 3 * 4_000 // 4, 6_000)
    sharded = traffic([FROZEN, LEARNING], Sharding.FSDP, 4, 8, itemsize=2)
    assert sharded.all_gather == 2 * 8 * 22_000 * 3 // 4
    assert sharded.reduce_scatter == 8 * 4_000 * 3 // 4
    assert traffic([LEARNING], Sharding.DDP, 1, 8, itemsize=2).total == 0


def held(name: str, unit: str, learns: bool, whole: int = 100) -> Held:
    return Held(name, (whole // 2,), whole=whole, itemsize=4, learns=learns, unit=unit)


def test_what_lies_outside_stays_gathered_while_blocks_come_and_go() -> None:
    frozen = Gathering.of([held("head", ROOT, False), *(held(f"{n}", f"{n}", False) for n in range(9))], itemsize=2)
    assert frozen.at(Point(0, 0, FORWARD)) == 200 + 3 * 200
    assert frozen.at(Point(0, 0, "4")) == 200 + 3 * 200
    learning = Gathering.of([held("head", ROOT, False), held("0", "0", True)], itemsize=2)
    assert learning.at(Point(0, 0, "0")) == 200 + 3 * 200 + 100 * (2 + 4)


def test_at_the_loss_only_the_last_block_is_on_its_way_and_at_the_end_what_lies_outside_is_reduced() -> None:
    found = Gathering.of([held("table", ROOT, True), held("0", "0", True), held("head", ROOT, True)], itemsize=2)
    assert found.at(Point(0, 0, "head")) == 400 + 200
    assert found.at(Point(0, 100, "0")) == 400 + 400 + 3 * 200 + 600
    assert found.at(Point(0, 200, "table")) == found.at(Point(0, 300, END)) == 400 + 200 * (2 + 4)


def test_blocks_that_stay_gathered_do_not_come_again() -> None:
    blocks = [held("head", ROOT, False), *(held(f"{n}", f"{n}", False) for n in range(9))]
    found = Gathering.of(blocks, itemsize=2, stays=True)
    assert found.at(Point(0, 0, FORWARD)) == found.at(Point(0, 0, "4")) == 10 * 200


def nothing(point: Point) -> int:
    return 0


def test_gradients_grow_while_activations_go() -> None:
    course = (Point(1000, 0, FORWARD), Point(800, 100, "one"), Point(100, 300, END))
    assert highest(course, nothing, 4, accumulates=True) == (1000, 0)
    assert highest(course, nothing, 4, accumulates=False) == (1300 - 1200, 0)
    assert highest(course, nothing, 0.5, accumulates=False) == (1000 - 150, 0)


def test_the_highest_point_is_that_of_all_together() -> None:
    course = (Point(1000, 0, FORWARD), Point(800, 0, "one"))
    assert highest(course, lambda point: 500 if point.where == "one" else 100, 4, accumulates=False) == (800, 500)


def test_a_tenth_of_a_gpu_is_left_to_others() -> None:
    memory = Memory(parameters=30, gradients=20, optimizer=20, activations=10, temporary=10)
    assert (memory.total, memory.needs) == (90, 100)


@pytest.mark.parametrize(
    ("asked", "ranks", "available", "chosen"),
    [
        ("Auto", 8, 100, Sharding.DDP),
        ("Auto", 8, 99, Sharding.FSDP),
        ("Auto", 1, 10, Sharding.DDP),
        ("Auto", 8, None, Sharding.DDP),
        ("DDP", 8, 10, Sharding.DDP),
        ("FSDP", 8, 1000, Sharding.FSDP),
    ],
)
def test_auto_takes_replicas_where_one_fits(asked: str, ranks: int, available: int | None, chosen: Sharding) -> None:
    spec = of("Full", distributed={"sharding": asked}).spec
    assert choose_sharding(spec, ranks, available, lambda memory: memory >= 100) is chosen


@pytest.mark.parametrize(
    "hyperparameters", [{"optimizer": "adamw8bit"}, {"optimizer": "adafactor"}, {"torchCompile": True}]
)
def test_what_the_api_refuses_in_shards_is_never_chosen(hyperparameters: dict[str, Any]) -> None:
    spec = of("Full", hyperparameters=hyperparameters).spec
    assert choose_sharding(spec, 8, 10, lambda memory: False) is Sharding.DDP


def test_nothing_is_estimated_where_it_decides_nothing() -> None:
    def never(memory: int) -> bool:
        raise AssertionError("asked")

    assert choose_sharding(of("Full", distributed={"sharding": "FSDP"}).spec, 8, 10, never) is Sharding.FSDP
    assert choose_sharding(of("Full").spec, 1, 10, never) is Sharding.DDP
