"""Parts of a model, chosen by where they are and what they do: one language for every strategy and schedule."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import Field

from finetune_api.common import UNIQUE, Message, cel, form, ruled, rules
from finetune_api.names import NAME
from finetune_api.uris import CLAIM


class ModuleKind(str, Enum):
    ATTENTION = "Attention"
    FEED_FORWARD = "FeedForward"
    LAYER_NORM = "LayerNorm"
    EMBEDDING = "Embedding"
    HEAD = "Head"


class Layers(Message):
    """Some of the model's blocks."""

    model_config = ruled(
        cel(
            "[has(self.first), has(self.last), has(self.indices)].filter(given, given).size() == 1",
            "set exactly one of layers.first, layers.last and layers.indices",
        )
    )

    first: int | None = Field(None, ge=1, le=1024, description="So many blocks from the input on.")
    last: int | None = Field(None, ge=1, le=1024, description="So many blocks before the output.")
    indices: list[Annotated[int, Field(ge=0, le=1023)]] | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="These blocks; the one at the input is 0.",
        json_schema_extra=UNIQUE,
    )


class ModelPart(Message):
    """Parameters that are in one of the layers and in a module of one of the kinds; what is absent does not restrict.

    Embedding, head and the norms outside of the blocks lie in no layer: where layers are given, they are chosen only
    when modules names their kind.
    """

    layers: Layers | None = Field(None, description="Which blocks; absent: all, and what lies outside of them.")
    modules: list[ModuleKind] | None = Field(
        None,
        min_length=1,
        max_length=5,
        description="Which kinds of modules; absent: all. A block's norms are LayerNorm, whatever they belong to.",
        json_schema_extra=UNIQUE,
    )


class NamedPart(ModelPart):
    """A part of the model, named by its layers, its modules, or both."""

    model_config = ruled(cel("has(self.layers) || has(self.modules)", "set layers, modules, or both"))


class AngleOrder(str, Enum):
    LARGEST = "Largest"
    SMALLEST = "Smallest"


class AngleSelection(Message):
    """The parts of blocks that another fine-tuning has turned most, or least (arXiv 2312.15681)."""

    from_: str = Field(
        alias="from",
        max_length=1024,
        description="That fine-tuning: job://name of a job in this namespace, the angles.json of its report, or the "
        "folder of a model that was fine-tuned from the same base.",
        json_schema_extra=rules(
            form(
                f"^(s3://[^/]+/.+|{CLAIM}(/.*)?|file:///.+|job://{NAME})$",
                "must be job://name, or angles.json or a model's folder at s3://, pvc:// or file:///",
            )
        ),
    )
    top_k: int = Field(ge=1, le=2048, description="So many attention and feed-forward parts of blocks.")
    order: AngleOrder = Field(
        AngleOrder.LARGEST,
        description="Largest: what that task changed most. Smallest: what it left as it was, to keep what is known.",
    )


class FisherSelection(Message):
    """The parameters that the empirical Fisher information of a sample holds for the most important."""

    fraction: float = Field(gt=0, le=1, description="Share of the chosen parameters that learns.")
    samples: int = Field(64, ge=1, le=65536, description="Training rows that are looked at.")


class Selection(ModelPart):
    """Parameters that learn: a part of the model, narrowed down by what a measure says of it."""

    model_config = ruled(
        cel(
            "has(self.layers) || has(self.modules) || has(self.angle) || has(self.fisher)",
            "set at least one of layers, modules, angle and fisher; to train everything use strategy Full",
        ),
        cel(
            "!has(self.angle) || !has(self.modules) || self.modules.exists(kind, kind in ['Attention', 'FeedForward'])",
            "angle ranks the attention and feed-forward parts of blocks; add one of these to modules, or remove it",
            at=".angle",
        ),
    )

    angle: AngleSelection | None = Field(
        None,
        description="Of the attention and feed-forward parts only those that another fine-tuning ranks first; without "
        "modules nothing else learns.",
    )
    fisher: FisherSelection | None = Field(
        None, description="Of all that only the parameters with the largest Fisher information."
    )
