"""The contract between operator and trainer: names, paths, ports, exit codes and what crosses the pod's border.

Both sides import this module and nothing of each other. Whatever is changed here is changed for jobs that are
running: an operator may meet trainers one release older or newer, so fields are only ever added, with defaults.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Literal

from pydantic import Field

from finetune_api.common import Message
from finetune_api.run import Sharding

# --- where a trainer finds its job -----------------------------------------------------------------------------------

JOB_FILE = "/etc/finetune/job.json"
"""The resolved FineTuneJob as JSON, mounted from the job's ConfigMap. The local adaptor moves it by ENV_JOB_FILE."""
SCRATCH_DIR = "/scratch"
"""The pod's own writable folder (an emptyDir): downloads, staged checkpoints, worker cause files."""
TERMINATION_LOG = "/dev/termination-log"
"""Where the last word of a pod goes: a TerminationMessage as JSON, at most MAX_TERMINATION_BYTES."""
VOLUMES_DIR = "/volumes"
"""pvc://claim/path is mounted at /volumes/claim, so it is read at /volumes/claim/path."""
MODEL_CACHE_DIR = "/model-cache"
"""Where model.cache is mounted."""
CACHE_HOST_DIR = "/var/cache/finetune"
"""The only folder of nodes that a job may mount, with what is below it."""
CA_BUNDLE_FILE = "/etc/finetune-ca/ca.crt"
"""The custom CA bundle for the S3 endpoint (storage.s3.caBundleConfigMap, key `ca.crt`)."""

MAX_TERMINATION_BYTES = 4096
"""The kubelet keeps this much of a termination message and cuts the rest."""

TRAINER_CONTAINER = "trainer"
"""The container whose exit code counts: sidecars that others inject do not speak for the job."""

# --- environment of a trainer pod ------------------------------------------------------------------------------------

ENV_JOB_FILE = "FINETUNE_JOB_FILE"
ENV_SCRATCH_DIR = "FINETUNE_SCRATCH_DIR"
ENV_TERMINATION_LOG = "FINETUNE_TERMINATION_LOG"
ENV_VOLUMES_DIR = "FINETUNE_VOLUMES_DIR"
ENV_ATTEMPT = "FINETUNE_ATTEMPT"
"""The number of this incarnation of all pods, from 1; by the downward API from ANNOTATION_ATTEMPT."""
ENV_POD_IP = "FINETUNE_POD_IP"
"""The address on which the pod serves its progress and, on index 0, the rendezvous store."""
ENV_POD_NAME = "FINETUNE_POD_NAME"
ENV_GRACE_PERIOD = "FINETUNE_GRACE_PERIOD_SECONDS"
"""Seconds between SIGTERM and SIGKILL: terminationGracePeriodSeconds of the pod."""

# torch's own names (its torchrun reads the same ones).
ENV_NNODES = "PET_NNODES"
"""By the downward API from ANNOTATION_NODES."""
ENV_NPROC_PER_NODE = "PET_NPROC_PER_NODE"
ENV_NODE_RANK = "PET_NODE_RANK"
ENV_MASTER_ADDR = "PET_MASTER_ADDR"
ENV_MASTER_PORT = "PET_MASTER_PORT"

# S3, in the names that the AWS SDKs read where they have one.
ENV_S3_ENDPOINT = "AWS_ENDPOINT_URL_S3"
ENV_S3_REGION = "AWS_REGION"
ENV_S3_ACCESS_KEY_ID = "AWS_ACCESS_KEY_ID"
ENV_S3_SECRET_ACCESS_KEY = "AWS_SECRET_ACCESS_KEY"
ENV_S3_SESSION_TOKEN = "AWS_SESSION_TOKEN"
ENV_S3_CA_BUNDLE = "AWS_CA_BUNDLE"
ENV_S3_PATH_STYLE = "FINETUNE_S3_PATH_STYLE"
"""`true` or `false`; the SDKs have no variable for it."""

ENV_HUB_ENDPOINT = "HF_ENDPOINT"
ENV_HUB_TOKEN = "HF_TOKEN"
"""In the names that Hugging Face's libraries read. The token is also the key in the Secret."""
ENV_MODEL_CACHE = "FINETUNE_MODEL_CACHE"
"""Where the model cache is mounted; absent: the job has none."""

SECRET_KEYS = (ENV_S3_ACCESS_KEY_ID, ENV_S3_SECRET_ACCESS_KEY, ENV_S3_SESSION_TOKEN)
"""Keys read from the Secret that storage.s3.secretName names; the session token is optional."""

# --- ports -----------------------------------------------------------------------------------------------------------

PROGRESS_PORT = 8090
"""GET /progress (Progress as JSON), GET /metrics (Prometheus) and GET /healthz, on rank 0's pod."""
RENDEZVOUS_PORT = 29500
"""torch's TCP store on the pod with index 0."""

# --- labels and annotations ------------------------------------------------------------------------------------------

GROUP = "finetune.dev"
VERSION = "v1alpha1"
LABEL_JOB = "finetune.dev/job"
"""On every child: the name of the FineTuneJob. Watches select by it on the server's side."""
LABEL_COMPONENT = "finetune.dev/component"
"""`trainer` or `preflight`."""
LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
"""On the child Job: the LocalQueue by which Kueue lets it start."""
ANNOTATION_STOPPING = "kueue.x-k8s.io/stopping"
"""On a Job: somebody who stops it has not done all yet, so Kueue does not resume it though it is suspended."""
ANNOTATION_ATTEMPT = "finetune.dev/attempt"
"""On the child Job's pod template, patched while the Job is suspended: the attempt that its next pods belong to."""

ANNOTATION_NODES = "finetune.dev/nodes"
"""Beside it: how many pods the gang has; an elastic job's may change between two attempts."""

# --- exit codes ------------------------------------------------------------------------------------------------------


class ExitCode(IntEnum):
    """Exit codes of a trainer pod, after sysexits.h; each has one meaning to the operator."""

    OK = 0
    """Result written and verified in the bucket."""
    USAGE = 64
    """The spec cannot work: a named field, and what to set instead."""
    DATA = 65
    """The dataset cannot work: file, line, why."""
    UNAVAILABLE = 69
    """Storage, hub or peers unreachable."""
    SOFTWARE = 70
    """Unexpected exception."""
    TEMPFAIL = 75
    """Stopped by SIGTERM after saving. Never 0: a rank that exits 0 would not be run again."""
    NOPERM = 77
    """Credentials refused."""
    OUT_OF_MEMORY = 79
    """Accelerator memory exhausted."""
    DIVERGED = 80
    """Loss or gradient not finite, twice from the same checkpoint."""
    STALLED = 81
    """No rank made progress for runPolicy.stallTimeoutSeconds; the stacks of all threads lie beside the report."""


NEVER_RETRIED = (ExitCode.USAGE, ExitCode.DATA, ExitCode.NOPERM, ExitCode.DIVERGED)
"""No budget changes these, so the child Job may fail on them at once."""

OOM_KILLED = 137
"""128 + SIGKILL, what the kernel's out-of-memory killer leaves; only with the reason OOMKilled."""

# --- messages --------------------------------------------------------------------------------------------------------


class Stage(str, Enum):
    """What a trainer is doing now, in the order of a run."""

    STARTING = "Starting"
    RENDEZVOUS = "Rendezvous"
    DOWNLOADING = "Downloading"
    PREPARING = "Preparing"
    LOADING = "Loading"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    SAVING = "Saving"
    EXPORTING = "Exporting"
    FINISHED = "Finished"


MAX_WARNINGS = 16
MAX_WARNING = 512
"""Characters of a warning."""


class CheckpointRef(Message):
    """A complete checkpoint: its manifest has been written."""

    uri: str = Field(max_length=1024, description="Folder of the checkpoint, ending in step-NNNNNNNN.")
    step: int = Field(ge=0, description="Optimizer steps done when it was taken.")
    time: str = Field(max_length=32, description="When its manifest was written, RFC 3339 in UTC.")


class Progress(Message):
    """What GET /progress answers; numbers are null until they are known."""

    attempt: int = 1
    stage: Stage = Stage.STARTING
    detail: str = Field("", max_length=256, description="The stage in words, such as `dataset 3/8 files, 1.2 GiB`.")
    step: int = 0
    total_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: int | None = None
    metrics: dict[str, float] = Field(default_factory=dict, description="Newest evaluation, such as `eval_loss`.")
    checkpoint: CheckpointRef | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    world_size: int | None = Field(None, description="Processes that train together.")
    global_batch_size: int | None = Field(None, description="Rows that one step learns from, over all processes.")
    sharding: Sharding | None = Field(None, description="How processes share the model: what Auto has come to.")
    peak_learning_rate: float | None = Field(None, description="What the schedule rises to, at that batch size.")
    warnings: list[str] = Field(default_factory=list, max_length=MAX_WARNINGS)
    heartbeat_age_seconds: float = Field(0.0, description="Seconds since the training thread last gave a sign of life.")
    updated_at: str = Field("", description="RFC 3339 in UTC.")


class OutputRef(Message):
    """Where the result lies."""

    uri: str = Field(max_length=1024)
    kind: Literal["adapter", "model"]
    report: str | None = Field(None, max_length=1024)


class Result(Message):
    """The content of result.json, and of the termination message of a pod that ended with OK."""

    job: str
    uid: str = ""
    output: OutputRef
    steps: int
    epochs: float | None = None
    exported_step: int | None = Field(None, description="The step whose weights are delivered; absent: the last.")
    stopped_early: str = Field("", max_length=256, description="Why training ended before its last step, if it did.")
    loss: float | None = Field(None, description="Training loss that was logged last; absent: nothing was to be done.")
    metrics: dict[str, float] = Field(default_factory=dict, description="Metrics of the tuned model.")
    baseline: dict[str, float] = Field(default_factory=dict, description="The same metrics of the base model.")
    checkpoint: CheckpointRef | None = None
    trainable_parameters: int = 0
    total_parameters: int = 0
    world_size: int = Field(1, description="Processes that trained together, in the last attempt.")
    global_batch_size: int = Field(0, description="Rows that one step learned from, over all processes.")
    learning_rate: float | None = Field(None, description="Peak learning rate, at that batch size.")
    train_seconds: float = 0.0
    tokens: int = 0
    samples: list[dict[str, str]] = Field(
        default_factory=list, description="Prompts with `prompt`, `reference`, `before` and `after`."
    )
    versions: dict[str, str] = Field(default_factory=dict)


class Cause(str, Enum):
    """Whose fault it was; the operator charges a restart to it."""

    USAGE = "Usage"
    DATA = "Data"
    PERMISSION = "Permission"
    DIVERGED = "Diverged"
    INFRASTRUCTURE = "Infrastructure"
    APPLICATION = "Application"
    OUT_OF_MEMORY = "OutOfMemory"
    DISRUPTION = "Disruption"
    STALLED = "Stalled"
    DEADLINE = "DeadlineExceeded"
    """A limit of time that the spec has set."""


CAUSE_OF_EXIT_CODE: dict[int, Cause] = {
    ExitCode.USAGE: Cause.USAGE,
    ExitCode.DATA: Cause.DATA,
    ExitCode.UNAVAILABLE: Cause.INFRASTRUCTURE,
    ExitCode.SOFTWARE: Cause.APPLICATION,
    ExitCode.TEMPFAIL: Cause.DISRUPTION,
    ExitCode.NOPERM: Cause.PERMISSION,
    ExitCode.OUT_OF_MEMORY: Cause.OUT_OF_MEMORY,
    ExitCode.DIVERGED: Cause.DIVERGED,
    ExitCode.STALLED: Cause.STALLED,
}


class TerminationMessage(Message):
    """The last word of a pod, as JSON in TERMINATION_LOG; at most MAX_TERMINATION_BYTES long."""

    exit_code: int
    cause: Cause | None = Field(None, description="Absent when the pod ended with OK.")
    message: str = Field("", description="What happened, in one or two sentences that name field, file or line.")
    advice: str = Field("", description="What to do about it.")
    log: str = Field("", description="The last lines of the log that belong to it, as far as there is room.")
    rank: int | None = Field(None, description="The global rank that was the culprit, where one was.")
    attempt: int = 1
    step: int | None = None
    checkpoint: CheckpointRef | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list, description="Those of Progress; the newest, where room is short.")
    result: Result | None = Field(None, description="On OK; without samples, which are in result.json.")
