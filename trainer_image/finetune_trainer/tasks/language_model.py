"""The next token: instruction tuning and plain text, on TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from finetune_trainer.data.packing import PackedCollator, collator, sft_arguments, verify_isolation
from finetune_trainer.data.preparation import PreparedText, prepare
from finetune_trainer.data.samples import Sample
from finetune_trainer.data.stream import Stream
from finetune_trainer.evaluation import Measured
from finetune_trainer.evaluation.answers import answers
from finetune_trainer.evaluation.held_out import TokenMeter
from finetune_trainer.loaded import is_weightless
from finetune_trainer.model import (
    check_positions,
    load_tokenizer,
    refuse_other_architectures,
    refuse_without_tokenizer,
)
from finetune_trainer.tasks.base import Inputs, Task
from finetune_trainer.tasks.trainer import JobMixin

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from finetune_trainer.hardware import Compute

PROBE_ROWS, PROBE_TOKENS = 2, 64
"""Enough to tell a wrong weight, little enough to be free."""


class LanguageModelTrainer(JobMixin, SFTTrainer):
    """TRL's trainer for rows that come tokenised, with labels."""


class LanguageModelTask(Task):
    """Tokenised rows with labels; that an instruction's words are not learned is in the labels of the data."""

    loader = "AutoModelForCausalLM"
    pipeline_tag = "text-generation"
    peft_task = "CAUSAL_LM"
    tokenizer: PreTrainedTokenizerBase
    prepared: PreparedText

    def refuse_files(self, names: set[str]) -> None:
        refuse_without_tokenizer(names, self.spec.model.uri)

    def check(self, config: PretrainedConfig, reserved: int = 0) -> None:
        refuse_other_architectures(config, self.spec)
        check_positions(config, self.spec.hyperparameters.max_length, reserved)

    def read_processor(self, folder: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
        self.tokenizer = load_tokenizer(folder, self.spec.model, config)
        return self.tokenizer

    def prepare(self, inputs: Inputs) -> PreparedText:
        spec = self.spec
        self.prepared = prepare(
            inputs.files,
            spec.dataset,
            spec.task.type,
            self.tokenizer,
            max_length=spec.hyperparameters.max_length,
            seed=spec.hyperparameters.seed,
            scratch=inputs.scratch,
            validation_files=inputs.validation_files,
            packing=bool(spec.hyperparameters.packing),
            samples=spec.evaluation.samples,
            processes=spec.hyperparameters.data_workers if spec.dataset.streaming else None,
            progress=inputs.progress,
        )
        return self.prepared

    def finish(self, model: PreTrainedModel) -> None:
        """Let generation end where answers end, and make sure that the documents of a pack are kept apart."""
        model.generation_config.eos_token_id = ends_of(model, self.prepared.eos_token_ids)
        if self.prepared.packed and not is_weightless(model):
            verify_isolation(model)

    def arguments(self, common: dict[str, Any], compute: Compute) -> SFTConfig:
        return SFTConfig(
            **common,
            include_num_input_tokens_seen="non_padding",
            # maxLength and packing have done their work: rows come tokenised, masked, cut and packed.
            **sft_arguments(self.prepared.packed, compute.attention),
        )

    def trainer(
        self, model: PreTrainedModel, arguments: SFTConfig, callbacks: list[TrainerCallback]
    ) -> LanguageModelTrainer:
        learning = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        attention = model.config.get_text_config()._attn_implementation
        trainer = LanguageModelTrainer(
            model=model,
            args=arguments,
            train_dataset=self._looked_at(),
            eval_dataset=self.prepared.validation,
            processing_class=self.tokenizer,
            data_collator=collator(self.prepared.packed, attention, self.tokenizer),
            callbacks=callbacks,
        )
        trainer.train_dataset = self.prepared.train
        trainer.meter = TokenMeter
        trainer.remove_callback(PrinterCallback)
        put_back(learning)
        return trainer

    def _looked_at(self) -> Dataset:
        """TRL looks at a row, and knows no streams but those of `datasets`."""
        train = self.prepared.train
        return Dataset.from_list(list(islice(train, 1))) if isinstance(train, Stream) else train

    def measure(self, trainer: LanguageModelTrainer, beat: Callable[[], None]) -> Measured:
        metrics = trainer.evaluate()
        beat()
        with trainer.accelerator.autocast():
            spoken = answers(
                trainer.model,
                self.tokenizer,
                self.prepared.samples,
                eos_token_ids=self.prepared.eos_token_ids,
                positions=self.spec.hyperparameters.max_length,
                beat=beat,
            )
        return Measured(metrics={name: metrics[name] for name in self.metrics}, answers=spoken)

    @property
    def samples(self) -> list[Sample]:
        return self.prepared.samples

    def probe(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Token ids, (rows, tokens), cut to the same length: padding would only be in the way."""
        ids = [row["input_ids"][:PROBE_TOKENS] for row in islice(self.prepared.train, PROBE_ROWS)]
        width = min(map(len, ids))
        return {"input_ids": torch.tensor([row[:width] for row in ids], device=model.device)}

    def examples(self, count: int) -> Iterator[dict[str, torch.Tensor]]:
        collate = PackedCollator(0) if self.prepared.packed else single
        return (collate([row]) for row in islice(self.prepared.train, count))


def single(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """One row as a batch of its own, which needs no padding."""
    (row,) = rows
    return {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}


def ends_of(model: PreTrainedModel, learned: list[int]) -> list[int]:
    """Tokens that end generation: what the training data ends answers with, and what ended them before."""
    known = model.generation_config.eos_token_id
    before = [known] if isinstance(known, int) else list(known or [])
    return list(dict.fromkeys([*learned, *before]))


def put_back(learning: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    """Undo TRL's rounding of what learns in a quantised model to bfloat16, where small updates would be lost."""
    for parameter, data in learning:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)
