"""Tasks with a head on a pretrained body: classes or a number for a text or an image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import PrinterCallback, TrainingArguments

from finetune_trainer.errors import UsageError
from finetune_trainer.evaluation import Measured
from finetune_trainer.evaluation.predictions import PredictionMeter
from finetune_trainer.evaluation.targets import labels_in
from finetune_trainer.heads import Head, draw_again, skeleton
from finetune_trainer.loaded import Loaded
from finetune_trainer.model import FIELD, Source, load_config, load_weights
from finetune_trainer.tasks.base import Task
from finetune_trainer.tasks.trainer import JobTrainer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback

    from finetune_trainer.data.prepared import Prepared
    from finetune_trainer.evaluation.targets import Target
    from finetune_trainer.hardware import Compute

GUESSING_ROWS = 10_000
"""Rows of a stream from which the plainest guess is made."""
Collator = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


class HeadTrainer(JobTrainer):
    """Takes the loss from the target, so that training and evaluation have one definition of it."""

    target: Target
    # A mean over the rows of a micro-step: the library then takes the mean over the micro-steps and ranks.
    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        """The models' own losses are the same, but count each micro-step of an accumulation as a whole step."""
        given = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**given)
        loss = self.target.losses(outputs.logits, inputs["labels"], self.args.label_smoothing_factor).mean()
        return (loss, outputs) if return_outputs else loss


class HeadTask(Task):
    """What tasks with a head share. A task gives the class attributes, `target` and `prepared` when it prepares its
    rows, and how rows become batches; the rows have their label in the column `labels`, as Target.tensor takes it.
    """

    mapping: ClassVar[str]
    """Name of transformers' table of architectures that can have this head."""
    usable: ClassVar[str]
    """Which models are, for people."""
    target: Target
    prepared: Prepared
    known: tuple[str, ...] = ()
    """Names of the base's outputs, in their order."""

    @property
    @abstractmethod
    def collator(self) -> Collator:
        """Makes batches of rows as the model takes them, with `labels`."""

    def check(self, config: PretrainedConfig, reserved: int = 0) -> None:
        from transformers.models.auto import modeling_auto

        self.known = labels_in(config)
        possible = getattr(modeling_auto, self.mapping)
        if config.model_type in possible or self.loader in (getattr(config, "auto_map", None) or {}):
            return
        raise UsageError(
            f"{FIELD}: {self.spec.model.uri} is {', '.join(config.architectures or [config.model_type])}, on which "
            f"there is no head for task {self.spec.task.type.value}",
            f"use {self.usable}; a folder with the body alone or with another head serves as well",
        )

    def configure(self, config: PretrainedConfig) -> None:
        """The classes' names and what is asked, so that whoever loads the model knows how to read its answers."""
        labels = self.target.labels
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
        config.problem_type = self.target.problem_type

    def load(self, source: Source) -> Loaded:
        """The model, its head kept where it answers exactly what is to be learned, and else drawn anew.

        Raises:
            UsageError: parameters of the body are missing.
        """
        head = Head(source, self.loader)
        found = load_weights(source, self.loader)
        lacking, missing = head.lacking(found.missing)
        self.refuse_missing(missing, source)
        kept = self.target.fits(load_config(source.folder, source.spec))
        self.fresh = lacking if kept else tuple(dict.fromkeys([*lacking, *head.outputs]))
        draw_again(found.model, self.fresh)
        return Loaded(found.model, self.fresh, self.peft_task, examples=self.examples, encode=self.encode)

    def skeleton(self, source: Source) -> Loaded:
        """With a new head: how many answers it has, and whether the base's own serves, only the data tells."""
        head = Head(source, self.loader)
        model = skeleton(source, self.loader, self.expected_outputs)
        return Loaded(model, fresh=head.outputs, peft_task=self.peft_task)

    @property
    def expected_outputs(self) -> int | None:
        """How many answers the spec alone tells of."""
        labels = self.spec.task.labels
        return len(labels) if labels else None

    @property
    def settings(self) -> str:
        return f", num_labels={len(self.target.labels)}, ignore_mismatched_sizes=True"

    @property
    def answers(self) -> str:
        return self.target.answers

    def finish(self, model: PreTrainedModel) -> None:
        """Nothing is generated, so nothing is kept for it."""
        if getattr(model.config, "use_cache", None):
            model.config.use_cache = False

    def arguments(self, common: dict[str, Any], compute: Compute) -> TrainingArguments:
        return TrainingArguments(**common, remove_unused_columns=False)

    def trainer(
        self, model: PreTrainedModel, arguments: TrainingArguments, callbacks: list[TrainerCallback]
    ) -> HeadTrainer:
        trainer = HeadTrainer(
            model=model,
            args=arguments,
            train_dataset=self.prepared.train,
            eval_dataset=self.prepared.validation,
            data_collator=self.collator,
            callbacks=callbacks,
        )
        trainer.target, trainer.meter = self.target, self.meter
        # Else the library counts labels for losses that are sums.
        trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)
        return trainer

    def meter(self) -> PredictionMeter:
        return PredictionMeter(self.target, [metric.value for metric in self.spec.evaluation.metrics or []])

    def measure(self, trainer: JobTrainer, beat: Callable[[], None]) -> Measured:
        metrics = trainer.evaluate()
        beat()
        return Measured(metrics={name: metrics[name] for name in self.metrics}, details=trainer.details)

    def baseline(self) -> Measured | None:
        """A fresh head says nothing yet; the plainest guess from the training rows takes its place."""
        held_out = self.prepared.validation
        if held_out is None or not self.fresh:
            return None
        labels, meter = self._labels(held_out), self.meter()
        meter.take(self.target.constant(self._labels(self.prepared.train)).expand(len(labels), -1), labels)
        metrics = {f"eval_{name}": value for name, value in meter.metrics().items()}
        return Measured(what=self.target.guess, metrics=metrics)

    def _labels(self, rows: Any) -> torch.Tensor:
        """The labels of rows; of a stream those of its beginning."""
        if hasattr(rows, "__len__"):
            return self.target.tensor(rows["labels"])
        return self.target.tensor(row["labels"] for row in islice(rows, GUESSING_ROWS))

    def probe(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        batch = self.collator(self.probe_rows())
        return {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}

    def probe_rows(self) -> list[dict[str, Any]]:
        """A few rows: enough to tell a wrong weight, little enough to be free."""
        return list(islice(self.prepared.train, 2))

    def examples(self, count: int) -> Iterator[dict[str, torch.Tensor]]:
        rows: Iterable[dict[str, Any]] = islice(self.prepared.train, count)
        return (self.collator([row]) for row in rows)
