"""Which parameters learn, and the options of each way."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import Field

from finetune_api.common import UNIQUE, Message, cel, only, ruled, rules


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
