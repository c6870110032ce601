"""Status of a FineTuneJob: what is true now. Written by the operator alone, whole and only when it differs."""

from __future__ import annotations

from enum import Enum
from typing import Literal

from pydantic import Field

from finetune_api.common import Message


class Phase(str, Enum):
    BLOCKED = "Blocked"
    PREFLIGHT = "Preflight"
    QUEUED = "Queued"
    STARTING = "Starting"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


TERMINAL = (Phase.SUCCEEDED, Phase.FAILED)


class ConditionType(str, Enum):
    VALID = "Valid"
    SCHEDULED = "Scheduled"
    RUNNING = "Running"
    COMPLETE = "Complete"
    FAILED = "Failed"
    SUSPENDED = "Suspended"
    STALLED = "Stalled"


class Condition(Message):
    """metav1.Condition; lastTransitionTime moves only when the status flips."""

    type: ConditionType
    status: Literal["True", "False", "Unknown"]
    reason: str = Field(max_length=1024, min_length=1)
    message: str = Field("", max_length=32768)
    last_transition_time: str = Field(max_length=32)
    observed_generation: int = 0


class ProgressStatus(Message):
    """The newest progress that the operator read from the trainer."""

    stage: str = Field("", max_length=32)
    step: int = 0
    total_steps: int | None = None
    percent: int | None = None
    steps: str | None = Field(None, max_length=48, description="For people and kubectl: 120/1000.")
    epoch: str | None = Field(None, max_length=32)
    loss: str | None = Field(None, max_length=32)
    learning_rate: str | None = Field(None, max_length=32)
    tokens_per_second: str | None = Field(None, max_length=32)
    eta_seconds: int | None = None
    eta: str | None = Field(None, max_length=32, description="For people and kubectl: 1h23m.")
    updated_at: str | None = Field(None, max_length=32)


class CheckpointStatus(Message):
    """The newest complete checkpoint."""

    uri: str = Field(max_length=1024)
    step: int
    time: str = Field(max_length=32)


class OutputStatus(Message):
    """What was delivered."""

    uri: str = Field(max_length=1024)
    kind: Literal["adapter", "model"]
    report: str | None = Field(None, max_length=1024)


class Restarts(Message):
    """Restarts by what caused them; budgets are held against these numbers."""

    total: int = 0
    disruption: int = 0
    infrastructure: int = 0
    application: int = 0
    out_of_memory: int = 0
    stalled: int = 0


class Incident(Message):
    """The incident that is being handled; written before anything is torn down, so that it is counted once."""

    cause: str = Field(max_length=64)
    message: str = Field("", max_length=4096)
    advice: str = Field("", max_length=4096)
    retry: bool = Field(description="Whether the budget allows another attempt; decided once, with the counter.")
    attempt: int
    started_at: str = Field(max_length=32)
    pod_uids: list[str] = Field([], max_length=1024, alias="podUIDs")


class FineTuneJobStatus(Message):
    """What is true now."""

    phase: Phase | None = None
    reason: str | None = Field(None, max_length=1024, description="CamelCase word for machines.")
    message: str | None = Field(
        None, max_length=4096, description="The most useful sentence a human could be told now."
    )
    progress: ProgressStatus | None = None
    metrics: dict[str, str] = Field({}, description="Newest evaluation, such as eval_loss; numbers as text.")
    baseline: dict[str, str] = Field({}, description="The same metrics of the model before training.")
    checkpoint: CheckpointStatus | None = None
    output: OutputStatus | None = None
    restarts: Restarts = Restarts()
    attempt: int = Field(0, description="Number of the incarnation of all pods, from 1.")
    incident: Incident | None = None
    active_seconds: int = Field(0, description="Time really running, over suspensions and restarts.")
    active_since: str | None = Field(
        None, max_length=32, description="Since when it runs now; adds up into activeSeconds."
    )
    conditions: list[Condition] = Field([], max_length=16)
    start_time: str | None = Field(None, max_length=32)
    completion_time: str | None = Field(None, max_length=32)
    observed_generation: int = 0
    workload: str | None = Field(
        None, max_length=253, description="UID of the child Job, so that a lost one is noticed."
    )
