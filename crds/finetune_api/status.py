"""Status of a FineTuneJob: what is true now. Written by the operator alone, whole and only when it differs."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.common import Message, keyed_by
from finetune_api.contract import MAX_WARNING, MAX_WARNINGS


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
    ADMITTED = "Admitted"
    """Whether the queue lets it run; only of jobs that have one, or whose Job somebody else has suspended."""
    SCHEDULED = "Scheduled"
    RUNNING = "Running"
    COMPLETE = "Complete"
    FAILED = "Failed"
    SUSPENDED = "Suspended"
    STALLED = "Stalled"


class Condition(Message):
    """metav1.Condition; lastTransitionTime moves only when the status flips."""

    type: ConditionType = Field(description="What is said to hold or not.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it does.")
    reason: str = Field(max_length=1024, min_length=1, description="CamelCase word for machines.")
    message: str = Field("", max_length=32768, description="The same for people.")
    last_transition_time: str = Field(max_length=32, description="When the status flipped; RFC 3339.")
    observed_generation: int = Field(0, description="metadata.generation that this was concluded from.")


class ProgressStatus(Message):
    """The newest progress that the operator read from the trainer."""

    stage: str = Field("", max_length=32, description="What the trainer is busy with, such as Training.")
    step: int = Field(0, description="Optimizer steps done.")
    total_steps: int | None = Field(None, description="Optimizer steps of the whole run.")
    percent: int | None = Field(None, description="Share of the steps that is done.")
    steps: str | None = Field(None, max_length=48, description="For people and kubectl: 120/1000.")
    epoch: str | None = Field(None, max_length=32, description="Passes over the data done, as a decimal number.")
    loss: str | None = Field(None, max_length=32, description="Newest training loss, as a decimal number.")
    learning_rate: str | None = Field(None, max_length=32, description="Learning rate of the newest step.")
    tokens_per_second: str | None = Field(None, max_length=32, description="Tokens trained on per second, by all pods.")
    eta_seconds: int | None = Field(None, description="Time left, as the last steps suggest.")
    eta: str | None = Field(None, max_length=32, description="For people and kubectl: 1h23m.")
    updated_at: str | None = Field(None, max_length=32, description="When the trainer said so; RFC 3339.")


class CheckpointStatus(Message):
    """The newest complete checkpoint."""

    uri: str = Field(max_length=1024, description="Folder of the checkpoint.")
    step: int = Field(description="Optimizer step after which it was taken.")
    time: str = Field(max_length=32, description="When it was complete; RFC 3339.")


class OutputStatus(Message):
    """What was delivered."""

    uri: str = Field(max_length=1024, description="Folder of the adapter or model.")
    kind: Literal["adapter", "model"] = Field(description="Whether it is an adapter or a whole model.")
    report: str | None = Field(None, max_length=1024, description="Folder of the report.")


class Restarts(Message):
    """Restarts by what caused them; budgets are held against these numbers."""

    total: int = Field(0, description="All of them.")
    disruption: int = Field(0, description="Preemption, eviction, node loss; free of charge.")
    infrastructure: int = Field(0, description="Storage, network, hardware.")
    application: int = Field(0, description="Unexpected errors of the program.")
    out_of_memory: int = Field(0, description="GPU or host memory exhausted.")
    stalled: int = Field(
        0, description="No progress for too long; held against retries.infrastructure, as infrastructure is."
    )


class Incident(Message):
    """The incident that is being handled; written before anything is torn down, so that it is counted once."""

    cause: str = Field(max_length=64, description="Cause as the operator classified it.")
    message: str = Field("", max_length=4096, description="What happened.")
    advice: str = Field("", max_length=4096, description="The way out.")
    retry: bool = Field(description="Whether the budget allows another attempt; decided once, with the counter.")
    attempt: int = Field(description="The attempt that it ended.")
    started_at: str = Field(max_length=32, description="When it was seen; RFC 3339.")
    pod_uids: list[Annotated[str, Field(max_length=64)]] = Field(
        [], max_length=1024, alias="podUIDs", description="Pods that must be gone before the next attempt."
    )


Figure = Annotated[str, Field(max_length=64)]


class FineTuneJobStatus(Message):
    """What is true now."""

    phase: Phase | None = Field(None, description="Where the job stands.")
    reason: str | None = Field(None, max_length=1024, description="CamelCase word for machines.")
    message: str | None = Field(
        None, max_length=4096, description="The most useful sentence a human could be told now."
    )
    progress: ProgressStatus | None = Field(None, description="The newest progress of the trainer.")
    metrics: dict[str, Figure] = Field(
        {}, max_length=64, description="Newest evaluation, such as eval_loss; numbers as text."
    )
    baseline: dict[str, Figure] = Field({}, max_length=64, description="The same metrics of the model before training.")
    warnings: list[Annotated[str, Field(max_length=MAX_WARNING)]] = Field(
        [], max_length=MAX_WARNINGS, description="What the trainer has warned of; each was an event too."
    )
    checkpoint: CheckpointStatus | None = Field(None, description="The newest complete checkpoint.")
    output: OutputStatus | None = Field(None, description="What was delivered.")
    references: dict[str, Annotated[str, Field(max_length=1024)]] = Field(
        {},
        max_length=8,
        description="Where the jobs that the spec names have delivered, by field; fixed before the first attempt.",
    )
    restarts: Restarts = Field(Restarts(), description="Restarts by what caused them.")
    attempt: int = Field(0, description="Number of the incarnation of all pods, from 1.")
    nodes: int = Field(
        0, description="Pods of this attempt: fewer than resources.nodes where an elastic job found no room for all."
    )
    trainer_image: str | None = Field(
        None, max_length=1024, description="Image of all its pods, by digest as soon as a node has told it."
    )
    incident: Incident | None = Field(None, description="The incident that is being handled.")
    active_seconds: int = Field(0, description="Time really running, over suspensions and restarts.")
    active_since: str | None = Field(
        None, max_length=32, description="Since when it runs now; adds up into activeSeconds."
    )
    node_failures: dict[str, int] = Field(
        {},
        max_length=64,
        description="How often pods failed on a node, for no fault of the job. From twice on the next attempts prefer "
        "others, unless a queue chooses the nodes.",
    )
    waiting_since: str | None = Field(
        None, max_length=32, description="Since when the pods do not all run although they may; RFC 3339."
    )
    conditions: list[Condition] = Field(
        [], max_length=16, description="What holds and what does not.", json_schema_extra=keyed_by("type")
    )
    start_time: str | None = Field(None, max_length=32, description="When its first pod ran; RFC 3339.")
    completion_time: str | None = Field(None, max_length=32, description="When it ended; RFC 3339.")
    observed_generation: int = Field(0, description="metadata.generation that this status was concluded from.")
    workload: str | None = Field(
        None, max_length=253, description="UID of the child Job, so that a lost one is noticed."
    )
