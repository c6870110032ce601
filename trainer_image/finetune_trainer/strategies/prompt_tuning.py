"""PromptTuning: learned embeddings before the text, delivered as an adapter of kilobytes."""

from __future__ import annotations

from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch

from finetune_api.strategy import PromptEncoder, PromptTuningOptions
from finetune_trainer.errors import UsageError
from finetune_trainer.strategies.peft import PeftStrategy
from finetune_trainer.strategies.virtual_tokens import VirtualTokensStrategy

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from finetune_trainer.loaded import Loaded


class PromptTuning(VirtualTokensStrategy):
    """Embeddings themselves (Lester et al., 2021), or what a small network makes of others (Liu et al., 2021)."""

    loading = PeftStrategy.loading + (
        "\n# Classifiers over causal models: rows of one length at a time, for among embeddings padding is not seen."
    )

    @property
    def options(self) -> PromptTuningOptions:
        assert self.spec.prompt_tuning is not None, "a resolved job has its options"
        return self.spec.prompt_tuning

    @property
    def virtual_tokens(self) -> int:
        return self.options.tokens

    def config(self, base: Loaded) -> PeftConfig:
        from peft import PromptEncoderConfig, PromptTuningConfig

        shape: dict[str, Any] = {
            "task_type": base.peft_task,
            "num_virtual_tokens": self.options.tokens,
            # Not the hidden size: OPT's and ALBERT's embeddings are narrower.
            "token_dim": base.model.get_input_embeddings().embedding_dim,
            # Which PEFT wants to know of every architecture, though only prefixes have them.
            "num_layers": 1,
            "num_attention_heads": 1,
            "modules_to_save": list(base.fresh) or None,
        }
        encoder = self.options.encoder
        if encoder is PromptEncoder.NONE:
            return PromptTuningConfig(**shape)
        return PromptEncoderConfig(**shape, encoder_reparameterization_type=encoder.value)

    def begin(self, model: PeftModel, base: Loaded) -> None:
        self.hooks += answer_at_the_last_token(model)
        if self.options.encoder is not PromptEncoder.NONE:
            return
        table = base.model.get_input_embeddings()
        with torch.no_grad():
            first = table(self._first_tokens(base, table.num_embeddings).to(table.weight.device))
            model.prompt_encoder["default"].embedding.weight.copy_(first)

    def _first_tokens(self, base: Loaded, vocabulary: int) -> torch.Tensor:
        """Token ids, (tokens,): the text's, from its beginning again where it is shorter; or drawn at random."""
        count, text = self.options.tokens, self.options.init_text
        if text is None:
            return torch.randint(vocabulary, (count,))
        assert base.encode is not None, "the API refuses prompts before anything but text"
        ids = base.encode(text)
        if not ids:
            raise UsageError(
                "spec.strategy.promptTuning.initText: the tokenizer makes no tokens of it", "use a text with words"
            )
        return torch.tensor(list(islice(cycle(ids), count)))


def answer_at_the_last_token(model: PeftModel) -> list[RemovableHandle]:
    """Let classifiers over causal models look at the last token of a row, be it padded or not.

    The library finds that token among the ids. Given embeddings, as here, it takes the last position, which may be
    padding: the answer to a row would depend on how long the other rows of its batch are.
    """
    base = model.get_base_model()
    head: nn.Module | None = getattr(base, "score", None)
    if head is None:
        return []
    attended: dict[str, torch.Tensor | None] = {}

    def look(module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        attended["mask"] = named.get("attention_mask")

    def move(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (hidden,), mask = arguments, attended["mask"]
        if mask is None:
            return arguments
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)
        found = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return (torch.cat([hidden[:, :-1], found[:, None]], dim=1),)

    return [base.register_forward_pre_hook(look, with_kwargs=True), head.register_forward_pre_hook(move)]
