"""What training starts from: the model and the data, and how places are written."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

from pydantic import Field

from finetune_api.common import Message, cel, form, not_yet, only, ruled, rules
from finetune_api.contract import CACHE_HOST_DIR
from finetune_api.names import ObjectName
from finetune_api.uris import DATA_URI, MODEL_URI


class AdapterSource(Message):
    """An adapter to go on from."""

    uri: str = Field(
        max_length=1024, description="Folder with adapter_config.json.", json_schema_extra=rules(MODEL_URI)
    )


class HubSpec(Message):
    """The hub behind hf://."""

    endpoint: str | None = Field(
        None,
        max_length=512,
        description="URL of a mirror; absent: https://huggingface.co.",
        json_schema_extra=rules(form("^https?://[^/ ]+.*$", "must be a URL: http://host:port or https://host")),
    )
    secret_name: ObjectName | None = Field(
        None, description="Secret with HF_TOKEN, for private and gated repositories; absent: without a token."
    )


class ModelCache(Message):
    """Where models are kept for other jobs: filled once, by whichever job comes first, and verified at every use."""

    model_config = ruled(
        cel("has(self.pvc) != has(self.hostPath)", "set exactly one of cache.pvc and cache.hostPath"),
    )

    pvc: ObjectName | None = Field(
        None, description="PersistentVolumeClaim; of more than one node only where it can be mounted by many."
    )
    host_path: str | None = Field(
        None,
        max_length=256,
        description="Folder of each node, which user 65532 can write; needs a namespace that admits hostPath volumes.",
        json_schema_extra=rules(
            form(
                f"^{CACHE_HOST_DIR}(/[A-Za-z0-9][-A-Za-z0-9._]*)*$",
                f"must be {CACHE_HOST_DIR} or a folder below it, which is all that jobs may mount of a node",
            )
        ),
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

    model_config = ruled(
        cel(
            "!has(self.hub) || self.uri.startsWith('hf://')",
            "hub is for models of the hub; remove it, or set model.uri to hf://org/name",
            at=".hub",
        ),
        cel(
            "!has(self.cache) || !(self.uri.startsWith('pvc://') || self.uri.startsWith('file://'))",
            "what lies on a volume is read where it is; remove model.cache",
            at=".cache",
        ),
    )

    uri: str = Field(
        max_length=1024,
        description="Folder with config.json, *.safetensors and the tokenizer or image processor: s3://bucket/prefix, "
        "hf://org/name@revision (a branch, tag or commit; fixed to its commit by the first attempt), pvc://claim/path "
        "or file:///path; or job://name, the model that another job in this namespace delivers.",
        json_schema_extra=rules(MODEL_URI),
    )
    hub: HubSpec | None = Field(None, description="The hub behind hf://; absent: huggingface.co, without a token.")
    cache: ModelCache | None = Field(None, description="Keep the model for other jobs; absent: each pod fetches it.")
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

    model_config = ruled(
        cel(
            "!self.streaming || !has(self.validation) || !has(self.validation.fraction)",
            "a stream cannot be split; set validation.uri instead of validation.fraction, or streaming to false",
            at=".validation.fraction",
        ),
        cel(
            "!self.streaming || self.format != 'image-folder'",
            "image folders are not streamed; set streaming to false, or put the images into parquet",
            at=".streaming",
        ),
        cel(
            "self.format != 'image-folder' || self.columns.size() == 0",
            "the classes of an image folder are the names of its folders, and it has no columns; remove columns",
            at=".columns",
        ),
    )

    uri: str = Field(
        max_length=1024,
        description="File, glob or prefix, such as s3://datasets/sharegpt/*.jsonl; jsonl, json, csv, parquet or txt, "
        "plain or compressed (.gz, .zst); for images a prefix with one folder for each class, or parquet.",
        json_schema_extra=rules(DATA_URI),
    )
    format: Annotated[
        DatasetFormat,
        Field(
            json_schema_extra=only(
                [
                    *("auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"),
                    *("labeled", "image-folder"),
                ],
                "format",
            )
        ),
    ] = Field(DatasetFormat.AUTO, description="Shape of a row. auto: found out from the first rows.")
    columns: dict[str, Annotated[str, Field(min_length=1, max_length=128)]] = Field(
        {},
        max_length=16,
        description="Names of the format's fields -> names in the data: {text: review, label: stars}. Fields: text, "
        "textPair, label and image (labeled), text (text), messages, conversations, tools, system, instruction, input, "
        "output, prompt, completion.",
    )
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
        description="Read while training, with nothing on disk, in an order shuffled by windows; needs maxSteps.",
    )
