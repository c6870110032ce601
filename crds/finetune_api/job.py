"""FineTuneJob: what a user asks for. Field docstrings become the CRD's descriptions and the API reference.

Defaults stand in the schema, so that `kubectl get -o yaml` shows what will happen. Three kinds have none there:
members of a union (a defaulted member would break the rule that names it), values that depend on the strategy
(see finetune_api.defaults), and what is simply off when absent.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

from pydantic import Field

from finetune_api.common import UNIQUE, Message, cel, form, immutable, not_yet, only, ruled, rules
from finetune_api.hyperparameters import Hyperparameters
from finetune_api.run import Distributed, PodTemplate, Resources, RunPolicy, Scheduling, StorageSpec, Tracking
from finetune_api.status import FineTuneJobStatus

NAME = "[a-z]([-a-z0-9]*[a-z0-9])?"
NAME_MAX_LENGTH = 45
"""Leaves room for what is appended to a child's name within the 63 characters of a DNS label."""

CLAIM = "pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?"
MODEL_URI = form(
    f"^(s3://[^/]+/.+|hf://[^/]+/[^/]+|{CLAIM}(/.*)?|file:///.+|job://{NAME})$",
    "must be s3://bucket/prefix, pvc://claim/path or file:///path",
)
DATA_URI = form(
    f"^(s3://[^/]+(/.*)?|{CLAIM}(/.*)?|file:///.+)$",
    "must be s3://bucket/prefix, pvc://claim/path or file:///path; a file, a glob or a prefix",
)
OUTPUT_URI = form(
    f"^(s3://[^/]+/.+|{CLAIM}/.+|file:///.+)$",
    "must be a prefix of its own: s3://bucket/prefix, pvc://claim/path or file:///path",
)


class TaskType(str, Enum):
    INSTRUCTION = "Instruction"
    CAUSAL_LM = "CausalLM"
    SEQUENCE_CLASSIFICATION = "SequenceClassification"
    REGRESSION = "Regression"
    IMAGE_CLASSIFICATION = "ImageClassification"
    REWARD_MODELING = "RewardModeling"
    PREFERENCE_OPTIMIZATION = "PreferenceOptimization"
    POLICY_OPTIMIZATION = "PolicyOptimization"
    EVALUATION = "Evaluation"


class TaskSpec(Message):
    """What is learned."""

    type: Annotated[TaskType, Field(json_schema_extra=only(["Instruction", "CausalLM"], "task type"))] = Field(
        description="Instruction: answers to instructions and conversations, with the loss on the assistant's words "
        "only. CausalLM: the next token of plain text."
    )


class AdapterSource(Message):
    """An adapter to go on from."""

    uri: str = Field(
        max_length=1024, description="Folder with adapter_config.json.", json_schema_extra=rules(MODEL_URI)
    )


class Dtype(str, Enum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Attention(str, Enum):
    AUTO = "auto"
    SDPA = "sdpa"
    FLASH_ATTENTION_2 = "flash_attention_2"
    EAGER = "eager"


class ModelSpec(Message):
    """The model that training starts from."""

    uri: str = Field(
        max_length=1024,
        description="Folder with config.json, *.safetensors and the tokenizer: s3://bucket/prefix, pvc://claim/path or "
        "file:///path.",
        json_schema_extra=rules(
            MODEL_URI,
            cel(
                "!self.startsWith('hf://') && !self.startsWith('job://')",
                "hf:// and job:// models are not supported yet; copy the model to s3:// or pvc:// and name that",
            ),
        ),
    )
    adapter: AdapterSource | None = Field(
        None,
        description="Go on from this adapter instead of a new one.",
        json_schema_extra=not_yet("model.adapter", "merge the adapter into the model and name that"),
    )
    dtype: Dtype = Field(
        Dtype.AUTO, description="Compute precision. auto: bfloat16 where the hardware has it, float32 elsewhere."
    )
    attention: Attention = Field(
        Attention.AUTO, description="Attention implementation. auto: the fastest one that the image and hardware have."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that lies beside the model's weights.")


class DatasetFormat(str, Enum):
    AUTO = "auto"
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"
    PROMPT_COMPLETION = "prompt-completion"
    TEXT = "text"
    PREFERENCE = "preference"
    LABELED = "labeled"
    IMAGE_FOLDER = "image-folder"


class InvalidRowPolicy(str, Enum):
    FAIL = "Fail"
    DROP = "Drop"


class ValidationData(Message):
    """Held-out rows: a share of the dataset, or a dataset of their own."""

    model_config = ruled(
        cel("has(self.fraction) != has(self.uri)", "set exactly one of validation.fraction and validation.uri"),
    )

    fraction: float | None = Field(None, gt=0, lt=1, description="Share of the rows that is held out.")
    uri: str | None = Field(
        None, max_length=1024, description="File, glob or prefix.", json_schema_extra=rules(DATA_URI)
    )


class DatasetSpec(Message):
    """The data."""

    uri: str = Field(
        max_length=1024,
        description="File, glob or prefix, such as s3://datasets/sharegpt/*.jsonl; jsonl, json, csv, parquet or txt, "
        "plain or compressed (.gz, .zst).",
        json_schema_extra=rules(DATA_URI),
    )
    format: Annotated[
        DatasetFormat,
        Field(
            json_schema_extra=only(["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"], "format")
        ),
    ] = Field(DatasetFormat.AUTO, description="Shape of a row. auto: found out from the first rows.")
    validation: ValidationData | None = Field(
        None, description="Rows that are not trained on; without them there is no evaluation."
    )
    on_invalid_row: InvalidRowPolicy = Field(
        InvalidRowPolicy.FAIL,
        description="What happens with a row that cannot be read or teaches nothing. Fail: the job fails and names "
        "file and line. Drop: the row is left out, counted and listed in the report.",
    )
    preparation: dict[str, Any] | None = Field(
        None,
        description="Cleaning, deduplication, balance, augmentation and PII handling.",
        json_schema_extra=not_yet("dataset.preparation", "prepare the data before the job"),
    )
    streaming: bool = Field(
        False,
        description="Read while training, with nothing on disk.",
        json_schema_extra=rules(cel("!self", "dataset.streaming is not supported yet; leave it false")),
    )


class StrategyType(str, Enum):
    FULL = "Full"
    PARTIAL = "Partial"
    LORA = "LoRA"
    QLORA = "QLoRA"
    ADAPTER = "Adapter"
    PROMPT_TUNING = "PromptTuning"
    PREFIX_TUNING = "PrefixTuning"
    IA3 = "IA3"
    LAYER_NORM = "LayerNorm"
    ADDITIVE = "Additive"
    GREEN = "Green"


ModuleName = Annotated[str, Field(min_length=1, max_length=128)]


class LoraOptions(Message):
    """Low-rank adaptation (Hu et al., 2021)."""

    rank: int = Field(16, ge=1, le=1024, description="Rank r of the update.")
    alpha: float = Field(
        32, gt=0, le=65536, description="The update is scaled by alpha/rank (rsLoRA: alpha/sqrt(rank))."
    )
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[ModuleName] = Field(
        ["all-linear"],
        min_length=1,
        max_length=64,
        description="Names (or endings of names) of the modules that get an adapter; all-linear: every linear layer "
        "but the output head.",
        json_schema_extra={
            **UNIQUE,
            **rules(
                cel(
                    "!('all-linear' in self) || self.size() == 1",
                    "all-linear means every linear layer; remove it or the other names",
                )
            ),
        },
    )
    modules_to_save: list[ModuleName] = Field(
        [],
        max_length=64,
        description="Modules trained whole and saved beside the adapter, such as lm_head.",
        json_schema_extra=UNIQUE,
    )
    rs_lora: bool = Field(False, description="Rank-stabilised scaling (Kalajdzievski, 2023).", alias="rsLoRA")
    dora: bool = Field(
        False,
        description="Weight-decomposed adaptation (Liu et al., 2024): slower, often better at low ranks.",
        alias="doRA",
    )


class QuantizationType(str, Enum):
    NF4 = "nf4"
    FP4 = "fp4"


class QuantizationOptions(Message):
    """4-bit storage of the frozen base (Dettmers et al., 2023)."""

    type: QuantizationType = Field(QuantizationType.NF4, description="4-bit number format of the frozen base.")
    double_quant: bool = Field(True, description="Quantise the quantisation constants too: 0.4 bits a parameter less.")


class StrategySpec(Message):
    """Which parameters learn, and what is delivered."""

    model_config = ruled(
        cel(
            "!has(self.lora) || self.type in ['LoRA', 'QLoRA']",
            "strategy.lora belongs to the types LoRA and QLoRA; remove it or change strategy.type",
            at=".lora",
        ),
        cel(
            "!has(self.quantization) || self.type == 'QLoRA'",
            "strategy.quantization belongs to the type QLoRA; remove it or set strategy.type to QLoRA",
            at=".quantization",
        ),
    )

    type: Annotated[StrategyType, Field(json_schema_extra=only(["Full", "LoRA", "QLoRA"], "strategy type"))] = Field(
        description="Full: every parameter. LoRA: low-rank adapters beside a frozen base. QLoRA: the same with the "
        "base held in 4 bits."
    )
    lora: LoraOptions | None = Field(None, description="Options of LoRA and QLoRA; absent: their defaults.")
    quantization: QuantizationOptions | None = Field(None, description="Options of QLoRA; absent: their defaults.")


class Metric(str, Enum):
    PERPLEXITY = "perplexity"
    ROUGE = "rouge"
    BLEU = "bleu"


class EarlyStopping(Message):
    """Stop when a metric no longer gets better."""

    metric: str = Field("eval_loss", max_length=64, description="Name of the metric.")
    patience: int = Field(3, ge=1, le=1000, description="Evaluations without improvement before the run stops.")


class EvaluationSpec(Message):
    """Evaluation on dataset.validation."""

    every_steps: int | None = Field(
        None, ge=1, le=10_000_000, description="Evaluate every so many steps; absent: only before and after training."
    )
    metrics: list[Annotated[Metric, Field(json_schema_extra=only(["perplexity"], "metric"))]] = Field(
        [Metric.PERPLEXITY],
        max_length=16,
        description="What is measured on the held-out rows, before and after training.",
        json_schema_extra=UNIQUE,
    )
    samples: int = Field(3, ge=0, le=32, description="Held-out prompts that are answered before and after training.")
    early_stopping: EarlyStopping | None = Field(
        None,
        description="Stop when a metric no longer gets better.",
        json_schema_extra=not_yet("evaluation.earlyStopping", "set hyperparameters.maxSteps"),
    )


class CheckpointSpec(Message):
    """Checkpoints in <output.uri>/checkpoints; the newest complete one is what a restart goes on from."""

    every_steps: int = Field(200, ge=1, le=10_000_000, description="Steps between two checkpoints.")
    keep: int = Field(3, ge=1, le=100, description="How many of the newest are kept; can be changed at any time.")


class OutputSpec(Message):
    """Where the result goes."""

    uri: str = Field(
        max_length=512,
        description="Prefix under which adapter/ or model/, report/, checkpoints/ and result.json are written.",
        json_schema_extra=rules(OUTPUT_URI),
    )
    merge: bool = Field(
        False,
        description="LoRA and QLoRA: deliver a whole model too, the adapter merged into the base in full precision.",
    )


class FineTuneJobSpec(Message):
    """What is to be trained, on what, how and where."""

    model_config = ruled(
        *immutable(
            "task",
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
            "!self.output.merge || self.strategy.type in ['LoRA', 'QLoRA']",
            "output.merge belongs to the strategies LoRA and QLoRA: Full delivers a whole model anyway; remove it",
            at=".output.merge",
        ),
        cel(
            "self.task.type != 'CausalLM' || self.dataset.format in ['auto', 'text']",
            "task CausalLM learns from plain text; set dataset.format to text, or task.type to Instruction",
            at=".dataset.format",
        ),
        cel(
            "self.task.type != 'Instruction' || self.dataset.format != 'text'",
            "task Instruction needs instructions and answers; set task.type to CausalLM for plain text",
            at=".dataset.format",
        ),
        cel(
            "!has(self.evaluation.everySteps) || has(self.dataset.validation)",
            "evaluation.everySteps needs held-out rows; set dataset.validation",
            at=".evaluation.everySteps",
        ),
        cel(
            "self.model.dtype != 'float16' || self.resources.gpusPerNode > 0",
            "float16 needs a GPU; set model.dtype to auto (float32 on a CPU) or bfloat16, or resources.gpusPerNode",
            at=".model.dtype",
        ),
        cel(
            "self.model.attention != 'flash_attention_2' || "
            "(self.resources.gpusPerNode > 0 && self.model.dtype != 'float32')",
            "flash_attention_2 needs a GPU and bfloat16 or float16; set model.attention to auto",
            at=".model.attention",
        ),
        cel(
            "self.hyperparameters.optimizer != 'pagedAdamw8bit' || self.resources.gpusPerNode > 0",
            "pagedAdamw8bit pages GPU memory and needs a GPU; set optimizer to adamw8bit (works on CPUs) or adamw",
            at=".hyperparameters.optimizer",
        ),
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
        RunPolicy(), description="When a job is stopped, started again and cleaned up; can be changed at any time."
    )
    tracking: Tracking | None = Field(
        None, description="Experiment trackers.", json_schema_extra=not_yet("tracking", "remove it")
    )
    suspend: bool = Field(
        False, description="true stops the job at the next step after a checkpoint; false goes on from there."
    )
    pod_template: PodTemplate | None = Field(None, description="Additions to the pods.")


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
        )
    )

    api_version: str = "finetune.dev/v1alpha1"
    kind: str = "FineTuneJob"
    metadata: ObjectMeta
    spec: FineTuneJobSpec = Field(description="What is to be trained, on what, how and where.")
    status: FineTuneJobStatus = Field(FineTuneJobStatus(), description="What is true now; written by the operator.")
