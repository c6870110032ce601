"""FineTuneJob: what a user asks for. Field docstrings become the CRD's descriptions and the API reference.

Defaults stand in the schema, so that `kubectl get -o yaml` shows what will happen. Three kinds have none there:
members of a union (a defaulted member would break the rule that names it), values that depend on the strategy
(see finetune_api.defaults), and what is simply off when absent.
"""

from __future__ import annotations

from enum import Enum

from pydantic import Field

from finetune_api.common import Message, cel, immutable, not_yet, ruled, rules
from finetune_api.evaluation import EarlyStopping, EvaluationSpec, Metric
from finetune_api.hyperparameters import Hyperparameters
from finetune_api.names import NAME, NAME_MAX_LENGTH
from finetune_api.pairs import RULES
from finetune_api.run import Distributed, PodTemplate, Resources, RunPolicy, Scheduling, StorageSpec, Tracking
from finetune_api.sources import (
    AdapterSource,
    Attention,
    DatasetFormat,
    DatasetSpec,
    Dtype,
    InvalidRowPolicy,
    ModelSpec,
    ValidationData,
)
from finetune_api.status import FineTuneJobStatus
from finetune_api.strategy import LoraOptions, QuantizationOptions, QuantizationType, StrategySpec, StrategyType
from finetune_api.task import TaskSpec, TaskType
from finetune_api.uris import OUTPUT_URI

__all__ = [
    "AdapterSource",
    "Attention",
    "CheckpointSpec",
    "DatasetFormat",
    "DatasetSpec",
    "Dtype",
    "EarlyStopping",
    "EvaluationSpec",
    "FineTuneJob",
    "FineTuneJobSpec",
    "InvalidRowPolicy",
    "LoraOptions",
    "Metric",
    "ModelSpec",
    "ObjectMeta",
    "OutputSpec",
    "QuantizationOptions",
    "QuantizationType",
    "StrategySpec",
    "StrategyType",
    "TaskSpec",
    "TaskType",
    "ValidationData",
    "Weights",
]


class CheckpointSpec(Message):
    """Checkpoints in <output.uri>/checkpoints; the newest complete one is what a restart goes on from."""

    every_steps: int = Field(200, ge=1, le=10_000_000, description="Steps between two checkpoints.")
    keep: int = Field(
        3,
        ge=1,
        le=100,
        description="How many of the newest are kept; can be changed at any time: the next checkpoint heeds it.",
    )


class Weights(str, Enum):
    BEST = "Best"
    LAST = "Last"


class OutputSpec(Message):
    """Where the result goes."""

    uri: str = Field(
        max_length=512,
        description="Prefix under which adapter/ or model/, report/, checkpoints/ and result.json are written.",
        json_schema_extra=rules(OUTPUT_URI),
    )
    merge: bool = Field(
        False,
        description="LoRA, QLoRA and IA3: deliver a whole model too, the adapter merged into the base in full "
        "precision.",
    )
    weights: Weights | None = Field(
        None,
        description="Best: those of the step with the best evaluation (evaluation.earlyStopping.metric, or eval_loss). "
        "Last: those of the last step. Absent: Best where evaluation.everySteps is set.",
    )


class FineTuneJobSpec(Message):
    """What is to be trained, on what, how and where."""

    model_config = ruled(
        # The classes are a set, which the server compares without their order; it is that of the model's outputs.
        cel(
            "self.task == oldSelf.task && (!has(self.task.labels) || "
            "self.task.labels.map(label, label) == oldSelf.task.labels.map(label, label))",
            "task cannot be changed after creation; delete the job and create it anew",
            at=".task",
        ),
        *immutable(
            "model",
            "dataset",
            "strategy",
            "hyperparameters",
            "evaluation",
            "output",
            "resources",
            "distributed",
            "storage",
            "scheduling",
            "tracking",
            "podTemplate",
        ),
        cel(
            "has(self.checkpoint) == has(oldSelf.checkpoint) && (!has(self.checkpoint) || "
            "self.checkpoint.everySteps == oldSelf.checkpoint.everySteps)",
            "checkpoint.everySteps cannot be changed after creation (checkpoint.keep can); delete the job and create "
            "it anew",
            at=".checkpoint.everySteps",
        ),
        cel(
            "has(self.runPolicy) == has(oldSelf.runPolicy) && (!has(self.runPolicy) || "
            "self.runPolicy.terminationGracePeriodSeconds == oldSelf.runPolicy.terminationGracePeriodSeconds)",
            "runPolicy.terminationGracePeriodSeconds cannot be changed after creation (the rest of runPolicy can); "
            "delete the job and create it anew",
            at=".runPolicy.terminationGracePeriodSeconds",
        ),
        *RULES,
    )

    task: TaskSpec = Field(description="What is learned.")
    model: ModelSpec = Field(description="The model that training starts from.")
    dataset: DatasetSpec = Field(description="The data.")
    strategy: StrategySpec = Field(description="Which parameters learn, and what is delivered.")
    hyperparameters: Hyperparameters = Field(Hyperparameters(), description="How the parameters learn.")
    evaluation: EvaluationSpec = Field(EvaluationSpec(), description="Evaluation on dataset.validation.")
    checkpoint: CheckpointSpec = Field(
        CheckpointSpec(),
        description="Checkpoints in <output.uri>/checkpoints; the newest complete one is what a restart goes on from.",
    )
    output: OutputSpec = Field(description="Where the result goes.")
    resources: Resources = Field(Resources(), description="What each pod gets; one pod is one node's share of the job.")
    distributed: Distributed = Field(Distributed(), description="How the work is spread over processes.")
    storage: StorageSpec = Field(StorageSpec(), description="Access to models, data and output.")
    scheduling: Scheduling = Field(Scheduling(), description="Where the pods may run, and in which order.")
    run_policy: RunPolicy = Field(
        RunPolicy(),
        description="When a job is stopped, started again and cleaned up; all but the grace period can be changed at "
        "any time.",
    )
    tracking: Tracking | None = Field(
        None, description="Experiment trackers.", json_schema_extra=not_yet("tracking", "remove it")
    )
    suspend: bool = Field(
        False, description="true stops the job at the next step after a checkpoint; false goes on from there."
    )
    pod_template: PodTemplate | None = Field(None, description="Additions to the pods.")

    @property
    def additions(self) -> PodTemplate:
        """podTemplate, without anything in it where the job has none."""
        return self.pod_template or PodTemplate()


class ObjectMeta(Message):
    """The part of Kubernetes' metadata that the product reads."""

    name: str = Field(max_length=NAME_MAX_LENGTH)
    namespace: str = "default"
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class FineTuneJob(Message):
    """A fine-tuning run: the model, the data and the strategy in, a tuned model or adapter in the bucket out."""

    model_config = ruled(
        cel(
            f"self.metadata.name.matches('^{NAME}$')",
            "the name must start with a small letter and have small letters, digits and '-' only: names of pods and "
            "services are made from it",
            at=".metadata.name",
        ),
        cel(
            "self.spec.model.uri != 'job://' + self.metadata.name",
            "a job cannot begin with its own result; name the job whose model it goes on from",
            at=".spec.model.uri",
        ),
        cel(
            "!has(self.spec.strategy.select) || !has(self.spec.strategy.select.angle) || "
            "self.spec.strategy.select.angle.from != 'job://' + self.metadata.name",
            "a job cannot choose its parameters by its own result; name the job that was trained before",
            at=".spec.strategy.select.angle.from",
        ),
    )

    api_version: str = "finetune.dev/v1alpha1"
    kind: str = "FineTuneJob"
    metadata: ObjectMeta
    spec: FineTuneJobSpec = Field(description="What is to be trained, on what, how and where.")
    status: FineTuneJobStatus = Field(FineTuneJobStatus(), description="What is true now; written by the operator.")
