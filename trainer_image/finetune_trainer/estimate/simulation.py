"""A job on other numbers of GPUs than there are here: its memory, its traffic, its checkpoints, and what helps."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pydantic import Field

from finetune_api.common import Message
from finetune_api.job import FineTuneJob, FineTuneJobSpec
from finetune_api.run import Sharding
from finetune_trainer.estimate.advice import Fits, less_memory
from finetune_trainer.estimate.estimate import Estimator
from finetune_trainer.estimate.figures import Estimate
from finetune_trainer.estimate.gpus import Gpu, gpu_of
from finetune_trainer.estimate.sharding import can_shard, choose_sharding
from finetune_trainer.estimate.sketch import Sketch, compute_of

MOST_RANKS = 1024


class Simulation(Message):
    """What `finetune plan --simulate` tells."""

    gpu_memory: int | None = Field(None, description="Bytes of the GPU that resources.gpuProduct names, if known.")
    estimates: list[Estimate]
    rows_per_step: list[int] = Field(description="Global batch of each estimate: rows (packs, images).")
    advice: str = Field("", description="What to change where the job's own number of GPUs does not suffice.")


def simulate(job: FineTuneJob, folder: Path, world_sizes: list[int]) -> Simulation:
    """Estimates for the job's own number of ranks, and for the others.

    Args:
        job: a resolved one.
        folder: holds config.json.

    Raises:
        UsageError: the spec names what the architecture does not have.
    """
    spec = job.spec
    gpu = gpu_of(spec.resources.gpu_product)
    simulator = Simulator(folder, gpu)
    own = spec.resources.ranks
    sizes = [own, *(size for size in dict.fromkeys(world_sizes) if size != own)]
    estimates = [simulator.estimate(spec, size) for size in sizes]
    values = spec.hyperparameters
    rows = values.per_device_batch_size * values.gradient_accumulation_steps
    return Simulation(
        gpu_memory=gpu.memory if gpu else None,
        estimates=estimates,
        rows_per_step=[rows * size for size in sizes],
        advice=advice(job, estimates[0], simulator.fits, gpu),
    )


class Simulator:
    """Estimates of one model's jobs for one kind of GPU; what does not depend on the number of ranks is kept."""

    def __init__(self, folder: Path, gpu: Gpu | None) -> None:
        self._folder, self._gpu = folder, gpu
        self._estimators: dict[str, Estimator] = {}

    def estimate(self, spec: FineTuneJobSpec, world_size: int) -> Estimate:
        """With the sharding that the spec names, or that Auto would choose."""
        estimator = self._estimator(spec)
        available = self._gpu.memory if self._gpu else None
        sharding = choose_sharding(spec, world_size, available, partial(estimator.fits_replicated, world_size))
        return estimator.of(world_size, sharding)

    def fits(self, spec: FineTuneJobSpec) -> bool:
        """Whether a job fits on its own number of GPUs."""
        return self._gpu is not None and self.estimate(spec, spec.resources.ranks).memory.needs <= self._gpu.memory

    def _estimator(self, spec: FineTuneJobSpec) -> Estimator:
        compute = compute_of(spec, self._gpu is None or self._gpu.bfloat16)
        key = f"{compute} {spec.strategy.model_dump_json()} {spec.hyperparameters.model_dump_json()}"
        if key not in self._estimators:
            self._estimators[key] = Estimator(partial(Sketch.of, spec, self._folder, compute))
        return self._estimators[key]


def advice(job: FineTuneJob, estimate: Estimate, fits: Fits, gpu: Gpu | None) -> str:
    """What to change where the estimate is more than the GPU has; empty where it fits, or no GPU is known."""
    if gpu is None or estimate.memory.needs <= gpu.memory:
        return ""
    sharded = estimate.sharding is Sharding.FSDP
    told = less_memory(job, sharded=sharded, fits=fits)
    nodes = _nodes(job.spec, fits)
    return f"{told}; or set resources.nodes to {nodes} with distributed.sharding FSDP" if nodes else told


def _nodes(spec: FineTuneJobSpec, fits: Fits) -> int | None:
    """The fewest nodes (doubled again and again) over which the job as it is fits sharded; None: none."""
    nodes = spec.resources.nodes * 2 if can_shard(spec) else MOST_RANKS + 1
    distributed = spec.distributed.model_copy(update={"sharding": Sharding.FSDP})
    while nodes * spec.resources.processes <= MOST_RANKS:
        resources = spec.resources.model_copy(update={"nodes": nodes})
        if fits(spec.model_copy(update={"resources": resources, "distributed": distributed})):
            return nodes
        nodes *= 2
    return None
