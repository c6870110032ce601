"""Strategies: which parameters learn, how the base is held, and what is delivered. One file each."""

from __future__ import annotations

from finetune_api.job import StrategySpec, StrategyType
from finetune_trainer.strategies.adapter import Adapter
from finetune_trainer.strategies.additive import Additive
from finetune_trainer.strategies.base import Strategy
from finetune_trainer.strategies.full import Full
from finetune_trainer.strategies.green import Green
from finetune_trainer.strategies.ia3 import IA3
from finetune_trainer.strategies.layer_norm import LayerNorm
from finetune_trainer.strategies.lora import Lora
from finetune_trainer.strategies.partial import Partial
from finetune_trainer.strategies.prefix_tuning import PrefixTuning
from finetune_trainer.strategies.prompt_tuning import PromptTuning
from finetune_trainer.strategies.qlora import QLora

__all__ = ["Strategy", "strategy_of"]

STRATEGIES: dict[StrategyType, type[Strategy]] = {
    StrategyType.FULL: Full,
    StrategyType.PARTIAL: Partial,
    StrategyType.LORA: Lora,
    StrategyType.QLORA: QLora,
    StrategyType.ADAPTER: Adapter,
    StrategyType.PROMPT_TUNING: PromptTuning,
    StrategyType.PREFIX_TUNING: PrefixTuning,
    StrategyType.IA3: IA3,
    StrategyType.LAYER_NORM: LayerNorm,
    StrategyType.ADDITIVE: Additive,
    StrategyType.GREEN: Green,
}


def strategy_of(spec: StrategySpec) -> Strategy:
    """The strategy that a resolved spec names."""
    return STRATEGIES[spec.type](spec)
