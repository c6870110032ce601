"""Classes of texts, and numbers for texts, from a head on an encoder or on a language model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DataCollatorWithPadding
from transformers.modeling_layers import GenericForSequenceClassification

from finetune_api.task import TaskType
from finetune_trainer.data.labeled import PreparedLabels, prepare_labeled
from finetune_trainer.errors import UsageError
from finetune_trainer.evaluation.targets import AnyClasses, Number, OneClass, Target
from finetune_trainer.heads import skeleton
from finetune_trainer.model import FIELD, Source, load_tokenizer, refuse_without_tokenizer
from finetune_trainer.tasks.base import Inputs
from finetune_trainer.tasks.head import HeadTask

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from finetune_trainer.hardware import Compute

MIN_LENGTH = 8
"""As for maxLength: fewer tokens say nothing."""
PROBE_TOKENS = 64


@dataclass(frozen=True)
class LabeledCollator:
    """Batches of labelled texts, padded to the longest of them."""

    tokenizer: PreTrainedTokenizerBase
    target: Target

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        # Not every tokenizer gives a mask of itself.
        given = [
            {name: row[name] for name in row if name != "labels"} | {"attention_mask": [1] * len(row["input_ids"])}
            for row in rows
        ]
        batch = DataCollatorWithPadding(self.tokenizer)(given)
        return {**batch, "labels": self.target.tensor(row["labels"] for row in rows)}


class LabeledTextTask(HeadTask):
    """SequenceClassification and Regression."""

    loader = "AutoModelForSequenceClassification"
    pipeline_tag = "text-classification"
    peft_task = "SEQ_CLS"
    mapping = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
    usable = "an encoder such as BERT, RoBERTa or ModernBERT, or a language model such as Llama, Qwen or Mistral"
    tokenizer: PreTrainedTokenizerBase
    prepared: PreparedLabels

    def refuse_files(self, names: set[str]) -> None:
        refuse_without_tokenizer(names, self.spec.model.uri)

    def check(self, config: PretrainedConfig, reserved: int = 0) -> None:
        super().check(config, reserved)
        self._reserved = reserved

    def read_processor(self, folder: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
        """The tokenizer, with a token to pad with, which the model must know: else it would read answers off it."""
        tokenizer = load_tokenizer(folder, self.spec.model, config)
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise UsageError(
                    f"{FIELD}: the tokenizer of {self.spec.model.uri} has no token to pad rows with",
                    "set pad_token in its tokenizer_config.json",
                )
            tokenizer.pad_token = tokenizer.eos_token
        text = config.get_text_config()
        text.pad_token_id = tokenizer.pad_token_id
        model = skeleton(Source(folder, self.spec.model, config, torch.float32, "eager"), self.loader)
        if isinstance(model, GenericForSequenceClassification):
            # These answer at a row's last token, and find it by the padding; behind virtual tokens they cannot, and
            # take the last place of all. With the padding on the left that is the same, and their positions are
            # relative ones.
            tokenizer.padding_side = "left"
        self._typed = "token_type_ids" in tokenizer.model_input_names and getattr(text, "type_vocab_size", 0) > 1
        self._max_length, self._limit = self._length(model, tokenizer)
        self.tokenizer = tokenizer
        return tokenizer

    def _length(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
        """Tokens of a row, and in words why so many: the default of maxLength is more than most encoders take."""
        wanted = self.spec.hyperparameters.max_length
        possible = min(positions(model) - self._reserved, tokenizer.model_max_length)
        if possible >= wanted:
            return wanted, f"hyperparameters.maxLength {wanted}"
        if possible < MIN_LENGTH:
            raise UsageError(
                f"{FIELD}: the model has only {positions(model)} positions, of which {self._reserved} are taken by "
                "virtual tokens",
                "use fewer virtual tokens, or a model with more positions",
            )
        return possible, f"the model's {possible} tokens (hyperparameters.maxLength is {wanted})"

    def prepare(self, inputs: Inputs) -> PreparedLabels:
        spec = self.spec
        self.prepared = prepare_labeled(
            inputs.files,
            spec.dataset,
            spec.task,
            self.tokenizer,
            max_length=self._max_length,
            limit=self._limit,
            typed=self._typed,
            seed=spec.hyperparameters.seed,
            scratch=inputs.scratch,
            validation_files=inputs.validation_files,
            order=self.known,
            processes=spec.hyperparameters.data_workers if spec.dataset.streaming else None,
            progress=inputs.progress,
        )
        self.target = self._target(self.prepared.classes)
        return self.prepared

    def _target(self, classes: tuple[str, ...]) -> Target:
        if self.spec.task.type is TaskType.REGRESSION:
            return Number()
        return AnyClasses(classes) if self.spec.task.multi_label else OneClass(classes)

    @property
    def expected_outputs(self) -> int | None:
        return 1 if self.spec.task.type is TaskType.REGRESSION else super().expected_outputs

    @property
    def collator(self) -> LabeledCollator:
        return LabeledCollator(self.tokenizer, self.target)

    @property
    def settings(self) -> str:
        return f"{super().settings}, pad_token_id={self.tokenizer.pad_token_id}"

    def arguments(self, common: dict[str, Any], compute: Compute) -> TrainingArguments:
        return super().arguments(common | {"include_num_input_tokens_seen": "non_padding"}, compute)

    def probe_rows(self) -> list[dict[str, Any]]:
        """Cut to the same length: padding would only be in the way."""
        rows = super().probe_rows()
        width = min(PROBE_TOKENS, *(len(row["input_ids"]) for row in rows))
        return [{name: cell[:width] if name != "labels" else cell for name, cell in row.items()} for row in rows]


def positions(model: PreTrainedModel) -> int:
    """The longest row that the model takes, in tokens; without a bound, more than any row has."""
    declared = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    found = [declared] if declared > 0 else []
    for name, module in model.named_modules():
        if (
            "position" in name.rpartition(".")[2]
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            # RoBERTa and its kin number positions from the one after the padding's.
            found.append(module.num_embeddings - module.padding_idx - 1)
    return min(found, default=1 << 30)
