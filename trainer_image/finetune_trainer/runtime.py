"""What a worker knows about its place: the pod's environment, the job, the rank, and whom to tell and to ask."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from finetune_api import contract
from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob
from finetune_trainer.errors import UsageError
from finetune_trainer.preemption import StopFlag
from finetune_trainer.progress import Reporter

ENV_STARTED_AT = "FINETUNE_STARTED_AT"
"""When launch began, in seconds since the epoch; from launch to its workers."""
DEFAULT_GRACE_SECONDS = 30
"""Kubernetes' own default."""


@dataclass(frozen=True)
class Pod:
    """What the environment says about this pod; the same for launch and its workers."""

    job_file: Path
    scratch: Path
    attempt: int
    nodes: int
    processes: int
    node_rank: int
    master_addr: str
    master_port: int | None
    address: str
    grace_seconds: int

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> Pod:
        """Read the contract's variables, for one process where absent; raises UsageError naming the variable."""
        nodes = _number(env, contract.ENV_NNODES, 1, least=1)
        address = env.get(contract.ENV_POD_IP, "127.0.0.1")
        if nodes > 1:
            _require(env, contract.ENV_NODE_RANK, contract.ENV_MASTER_ADDR)
        port = env.get(contract.ENV_MASTER_PORT)
        pod = cls(
            job_file=Path(env.get(contract.ENV_JOB_FILE, contract.JOB_FILE)),
            scratch=Path(env.get(contract.ENV_SCRATCH_DIR, contract.SCRATCH_DIR)),
            attempt=_number(env, contract.ENV_ATTEMPT, 1, least=1),
            nodes=nodes,
            processes=_number(env, contract.ENV_NPROC_PER_NODE, 1, least=1),
            node_rank=_number(env, contract.ENV_NODE_RANK, 0, least=0),
            master_addr=env.get(contract.ENV_MASTER_ADDR, address),
            master_port=_number(env, contract.ENV_MASTER_PORT, 0, least=1) if port else None,
            address=address,
            grace_seconds=_number(env, contract.ENV_GRACE_PERIOD, DEFAULT_GRACE_SECONDS, least=1),
        )
        if pod.node_rank >= nodes:
            raise UsageError(f"{contract.ENV_NODE_RANK} is {pod.node_rank}, but {contract.ENV_NNODES} is {nodes}")
        return pod

    @property
    def ranks(self) -> range:
        """The global ranks of this pod."""
        first = self.node_rank * self.processes
        return range(first, first + self.processes)

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.processes


@dataclass(frozen=True)
class Context:
    """What `train.main` gets.

    `job_file` is where the job was read and may be read again; `started_at` is when the pod's launch began (seconds
    since the epoch); `scratch` is the pod's own folder, shared by its ranks; `stop` says when to save and leave;
    `reporter` takes what the user should see.
    """

    job: FineTuneJob
    job_file: Path
    attempt: int
    rank: int
    local_rank: int
    world_size: int
    node_rank: int
    scratch: Path
    stop: StopFlag
    reporter: Reporter
    started_at: float

    @classmethod
    def from_environment(
        cls, env: Mapping[str, str] = os.environ, stop: StopFlag | None = None, reporter: Reporter | None = None
    ) -> Context:
        """Read the contract's and torch's variables, for one process where they are absent; raises UsageError."""
        pod = Pod.from_environment(env)
        rank, world_size = _number(env, "RANK", 0, least=0), _number(env, "WORLD_SIZE", 1, least=1)
        if stop is None:
            stop = StopFlag(pod.grace_seconds)
        stop.world_size = world_size
        return cls(
            job=load_job(pod.job_file),
            job_file=pod.job_file,
            attempt=pod.attempt,
            rank=rank,
            local_rank=_number(env, "LOCAL_RANK", 0, least=0),
            world_size=world_size,
            node_rank=pod.node_rank,
            scratch=pod.scratch,
            stop=stop,
            reporter=reporter or Reporter(pod.attempt, rank, progress_file(pod.scratch)),
            started_at=float(env.get(ENV_STARTED_AT, time.time())),
        )

    def alive(self) -> None:
        """Say between two pieces of long work that it goes on; raises StoppedError where the pod was asked to stop."""
        self.stop.check()
        self.reporter.beat()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which commits checkpoints and writes the result."""
        return self.rank == 0

    @property
    def result_file(self) -> Path:
        """Where rank 0 leaves its `contract.Result`; launch puts it into the termination message."""
        return result_file(self.scratch)


def result_file(scratch: Path) -> Path:
    return scratch / "result.json"


def progress_file(scratch: Path) -> Path:
    return scratch / "progress.json"


def load_job(path: Path) -> FineTuneJob:
    """The resolved job; raises UsageError that names the file and the field."""
    try:
        return resolve(FineTuneJob.from_wire(json.loads(path.read_text(encoding="utf-8"))))
    except OSError as error:
        advice = f"mount the job there, or set {contract.ENV_JOB_FILE}"
        raise UsageError(f"cannot read the job from {path}: {error.strerror}", advice) from error
    except ValidationError as error:
        raise UsageError(f"{path} does not match the API: {_mistakes(error)}", "compare it with the CRD") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}", "apply the FineTuneJob again") from error


def _mistakes(error: ValidationError) -> str:
    """The first three, each with its field's path."""
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:3])


def _require(env: Mapping[str, str], *names: str) -> None:
    missing = [name for name in names if not env.get(name)]
    if missing:
        raise UsageError(f"{' and '.join(missing)} must be set where {contract.ENV_NNODES} is above 1")


def _number(env: Mapping[str, str], name: str, default: int, *, least: int) -> int:
    text = env.get(name, str(default))
    if not text.isdigit() or int(text) < least:
        raise UsageError(f"{name} is {text!r}; it must be a whole number of at least {least}")
    return int(text)
