"""Which parameters learn, and the options of each way."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import Field

from finetune_api.common import UNIQUE, Message, cel, missing, ruled, rules
from finetune_api.selection import Layers, NamedPart, Selection


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


ADAPTERS = (StrategyType.LORA, StrategyType.QLORA, StrategyType.IA3)
"""Those whose update can be merged into the base."""
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
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = Field(
        {},
        max_length=64,
        description="Other ranks for some of the modules, by their names or endings of names: {v_proj: 32}.",
        json_schema_extra=rules(
            cel(
                "self.all(name, name.size() > 0 && name.size() <= 128)",
                "keys must be names of modules, of 1 to 128 characters",
            )
        ),
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


class BottleneckPlacement(str, Enum):
    HOULSBY = "Houlsby"
    PFEIFFER = "Pfeiffer"


class Activation(str, Enum):
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"


class BottleneckOptions(Message):
    """Small networks inside of every block: h + up(activation(down(h))), beginning as h (Houlsby et al., 2019)."""

    placement: BottleneckPlacement = Field(
        BottleneckPlacement.HOULSBY,
        description="Houlsby: after attention and after the feed-forward. Pfeiffer: after the feed-forward only.",
    )
    size: int = Field(64, ge=1, le=8192, description="Width of the bottleneck.")
    activation: Activation = Field(Activation.RELU, description="Between the projections.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout inside of the bottleneck.")
    layer_norms: bool = Field(True, description="Train the blocks' norms too, as in the original.")
    layers: Layers | None = Field(None, description="Only in these blocks; absent: in all.")


class PromptEncoder(str, Enum):
    NONE = "None"
    MLP = "MLP"
    LSTM = "LSTM"


class PromptTuningOptions(Message):
    """Learned embeddings before the text (Lester et al., 2021), or made by an encoder: P-tuning (Liu et al., 2021)."""

    model_config = ruled(
        cel(
            "!has(self.initText) || self.encoder == 'None'",
            "initText begins with the embeddings of a text, which an encoder does not; set encoder to None, or remove "
            "it",
            at=".initText",
        )
    )

    tokens: int = Field(20, ge=1, le=1024, description="Virtual tokens; they count against the model's positions.")
    init_text: str | None = Field(
        None, min_length=1, max_length=4096, description="Begin with this text's embeddings; absent: with random ones."
    )
    encoder: PromptEncoder = Field(
        PromptEncoder.NONE,
        description="MLP or LSTM: P-tuning, the embeddings are what a small network makes of others.",
    )


class PrefixTuningOptions(Message):
    """Learned keys and values before those of the text, in every block (Li and Liang, 2021)."""

    tokens: int = Field(20, ge=1, le=1024, description="Virtual tokens; they count against the model's positions.")
    projection: bool = Field(
        False, description="Learn them through a small network: steadier at high rates, more parameters while training."
    )


class Ia3Options(Message):
    """Learned factors on keys, values and the inner feed-forward activations (Liu et al., 2022)."""

    target_modules: list[ModuleName] = Field(
        [],
        max_length=64,
        description="Names (or endings of names) of linear modules; empty: keys, values and the feed-forward's last, "
        "found by the model's structure.",
        json_schema_extra=UNIQUE,
    )


class BlockPlacement(str, Enum):
    INTERLEAVED = "Interleaved"
    LAST = "Last"


class AdditiveOptions(Message):
    """New blocks that begin as the identity, between or after frozen ones (LLaMA Pro, Wu et al., 2024); a new head."""

    blocks: int = Field(
        2,
        ge=0,
        le=256,
        description="Blocks that are added, copies of their predecessors. 0: only the head is new, which trains the "
        "head of a classifier over a frozen model.",
    )
    placement: BlockPlacement = Field(
        BlockPlacement.INTERLEAVED, description="Interleaved: at equal distances. Last: after all others."
    )
    head: bool = Field(
        False,
        description="Train a head of its own too: it begins as a copy. A head that the task adds is trained anyway.",
    )


class GreenOptions(Message):
    """GreenTrainer (arXiv 2309.13192): train the tensors that lower the loss most for what their gradients cost."""

    target: float = Field(
        0.5,
        gt=0.05,
        lt=1,
        description="Floating point operations of training, forward and backward, as a share of Full's.",
    )
    every_steps: int = Field(
        100, ge=1, le=10_000_000, description="Steps between two selections; each costs two steps without an update."
    )


class Unfreezing(Message):
    """Gradual unfreezing from the output to the input (ULMFiT, Howard and Ruder, 2018)."""

    model_config = ruled(
        cel(
            "has(self.everySteps) != has(self.everyEpochs)",
            "set exactly one of unfreezing.everySteps and unfreezing.everyEpochs",
        ),
        cel(
            "!has(self.stages) || !has(self.layersPerStage)",
            "unfreezing.stages says what each stage adds; remove layersPerStage",
            at=".layersPerStage",
        ),
    )

    every_steps: int | None = Field(None, ge=1, le=10_000_000, description="Optimizer steps of a stage.")
    every_epochs: float | None = Field(None, gt=0, le=1000, description="Passes over the data of a stage.")
    layers_per_stage: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Blocks that each stage adds, from the output on; absent: 1. The first stage is the head and what "
        "else lies after the blocks; the embedding comes with the last one.",
    )
    stages: list[NamedPart] | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="Instead: what each stage adds to those before it. What none of them names joins with the last.",
    )


OWNERS: dict[str, tuple[StrategyType, ...]] = {
    "lora": (StrategyType.LORA, StrategyType.QLORA),
    "quantization": (StrategyType.QLORA,),
    "select": (StrategyType.PARTIAL, StrategyType.LAYER_NORM),
    "adapter": (StrategyType.ADAPTER,),
    "promptTuning": (StrategyType.PROMPT_TUNING,),
    "prefixTuning": (StrategyType.PREFIX_TUNING,),
    "ia3": (StrategyType.IA3,),
    "additive": (StrategyType.ADDITIVE,),
    "green": (StrategyType.GREEN,),
    "unfreezing": (StrategyType.FULL, StrategyType.PARTIAL, StrategyType.LAYER_NORM),
}
"""Options, and the strategies that have them."""


def _belongs(field: str, owners: tuple[StrategyType, ...]) -> dict[str, str]:
    names = [owner.value for owner in owners]
    allowed = ", ".join(f"'{name}'" for name in names)
    if len(names) == 1:
        belongs, way_out = f"type {names[0]}", f"set strategy.type to {names[0]}"
    else:
        belongs, way_out = f"types {', '.join(names[:-1])} and {names[-1]}", "change strategy.type"
    return cel(
        f"!has(self.{field}) || self.type in [{allowed}]",
        f"strategy.{field} belongs to the {belongs}; remove it or {way_out}",
        at=f".{field}",
    )


class StrategySpec(Message):
    """Which parameters learn, and what is delivered."""

    model_config = ruled(
        *(_belongs(field, owners) for field, owners in OWNERS.items()),
        missing(
            "self.type != 'Partial' || has(self.select)",
            "Partial needs strategy.select, such as {layers: {last: 2}}; to train everything use type Full",
            at=".select",
        ),
        cel(
            "self.type != 'LayerNorm' || !has(self.select) || !has(self.select.modules)",
            "LayerNorm trains norms and nothing else; remove select.modules, or use type Partial",
            at=".select.modules",
        ),
        cel(
            "self.type != 'LayerNorm' || !has(self.select) || !has(self.select.angle)",
            "angle ranks attention and feed-forward parts, and LayerNorm trains neither; use select.fisher, or type "
            "Partial",
            at=".select.angle",
        ),
    )

    type: StrategyType = Field(
        description="Full: every parameter. Partial: those that select names. LoRA: low-rank adapters beside a frozen "
        "base. QLoRA: the same with the base held in 4 bits. Adapter: bottlenecks in every block. PromptTuning and "
        "PrefixTuning: virtual tokens before the text. IA3: factors on activations. LayerNorm: the norms. Additive: "
        "new blocks between frozen ones. Green: what lowers the loss most within a budget of operations."
    )
    lora: LoraOptions | None = Field(None, description="Options of LoRA and QLoRA; absent: their defaults.")
    quantization: QuantizationOptions | None = Field(None, description="Options of QLoRA; absent: their defaults.")
    select: Selection | None = Field(
        None, description="What learns: needed by Partial; narrows down LayerNorm, which absent trains every norm."
    )
    adapter: BottleneckOptions | None = Field(None, description="Options of Adapter; absent: their defaults.")
    prompt_tuning: PromptTuningOptions | None = Field(
        None, description="Options of PromptTuning; absent: their defaults."
    )
    prefix_tuning: PrefixTuningOptions | None = Field(
        None, description="Options of PrefixTuning; absent: their defaults."
    )
    ia3: Ia3Options | None = Field(None, description="Options of IA3; absent: their defaults.", alias="ia3")
    additive: AdditiveOptions | None = Field(None, description="Options of Additive; absent: their defaults.")
    green: GreenOptions | None = Field(None, description="Options of Green; absent: their defaults.")
    unfreezing: Unfreezing | None = Field(
        None, description="Train from the head downwards, more with every stage; absent: everything from the start on."
    )
