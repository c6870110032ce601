"""What every task is to the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from finetune_api.job import FineTuneJobSpec
from finetune_trainer.data.prepared import Prepared
from finetune_trainer.data.samples import Sample
from finetune_trainer.data.sources import NamedFile, SizedFile
from finetune_trainer.errors import UsageError
from finetune_trainer.evaluation import Measured
from finetune_trainer.heads import skeleton
from finetune_trainer.loaded import Loaded
from finetune_trainer.model import FIELD, Source, load_weights

if TYPE_CHECKING:
    import torch
    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerCallback,
        TrainingArguments,
    )

    from finetune_trainer.hardware import Compute
    from finetune_trainer.storage import Store
    from finetune_trainer.tasks.trainer import JobTrainer


@dataclass(frozen=True)
class Inputs:
    """Where a task finds the dataset.

    Attributes:
        files: of dataset.uri, brought here; a stream's lie in the store and are read from there.
        validation_files: of dataset.validation.uri.
        scratch: folder for what is prepared.
        progress: called with the part of the work and the rows done; raises when the pod must go.
    """

    store: Store
    files: list[NamedFile] | list[SizedFile]
    validation_files: list[NamedFile]
    scratch: Path
    progress: Callable[[str, int], None] = lambda part, rows: None


class Task(ABC):
    """What is learned: the model's output, the data, the loss, the metrics. Knows nothing of strategies.

    One instance serves one run, and its methods are called in the order in which they stand here.
    """

    loader: ClassVar[str]
    """Class of transformers that loads a model with this output, such as AutoModelForCausalLM."""
    pipeline_tag: ClassVar[str]
    """What hubs call models of this kind."""
    peft_task: ClassVar[str | None]
    """See Loaded.peft_task."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """Reads texts, once `read_processor` has found it; None where the input is no text."""
    fresh: tuple[str, ...] = ()
    """See Loaded.fresh; of the model that was loaded last."""

    def __init__(self, spec: FineTuneJobSpec) -> None:
        self.spec = spec

    @abstractmethod
    def refuse_files(self, names: set[str]) -> None:
        """Raise UsageError when files beside the weights are missing; asked before anything large is downloaded."""

    @abstractmethod
    def check(self, config: PretrainedConfig, reserved: int = 0) -> None:
        """Raise UsageError when the architecture cannot have this output, or too few positions.

        Args:
            reserved: positions that are taken before the first token of a row.
        """

    @abstractmethod
    def read_processor(self, folder: Path, config: PretrainedConfig) -> Any:
        """The tokenizer or image processor that lies beside the weights; raises UsageError."""

    @abstractmethod
    def prepare(self, inputs: Inputs) -> Prepared:
        """The rows, checked and encoded.

        Raises:
            DataError: rows that cannot be used, by file and line.
        """

    def configure(self, config: PretrainedConfig) -> None:
        """Write into the configuration what the data says of the output, such as the names of the classes."""

    def load(self, source: Source) -> Loaded:
        """The model with this output, and which of its modules the base did not have.

        Raises:
            UsageError: weights are missing that no training on this data could make up for.
        """
        found = load_weights(source, self.loader)
        self.refuse_missing(found.missing, source)
        return Loaded(found.model, peft_task=self.peft_task, examples=self.examples, encode=self.encode)

    @property
    def encode(self) -> Callable[[str], list[int]] | None:
        """See Loaded.encode."""
        return partial(self.tokenizer.encode, add_special_tokens=False) if self.tokenizer else None

    def skeleton(self, source: Source) -> Loaded:
        """What `load` will give, as far as the configuration tells: without weights, and without looking at data."""
        return Loaded(skeleton(source, self.loader), peft_task=self.peft_task)

    def refuse_missing(self, missing: list[str], source: Source) -> None:
        """Raise UsageError for tensors that the library has filled with random numbers."""
        if missing:
            raise UsageError(
                f"{FIELD}: the weights of {source.spec.uri} lack {len(missing)} tensors that the architecture needs, "
                f"such as {missing[0]}",
                "upload all shards of the model; check that config.json belongs to them",
            )

    @property
    def settings(self) -> str:
        """What `loader` must be told of the output when it loads the bare base: further arguments, as Python code."""
        return ""

    @property
    def answers(self) -> str:
        """What the output says, in a sentence for the model card."""
        return ""

    def finish(self, model: PreTrainedModel) -> None:
        """Set on the model what its users will need, once it is prepared; raise UsageError if it cannot work."""

    @abstractmethod
    def arguments(self, common: dict[str, Any], compute: Compute) -> TrainingArguments:
        """The trainer's settings: those of every task, and this one's."""

    @abstractmethod
    def trainer(
        self, model: PreTrainedModel, arguments: TrainingArguments, callbacks: list[TrainerCallback]
    ) -> JobTrainer:
        """A trainer that is ready to evaluate and train; the model's parameters learn as they are marked."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what an evaluation gives and status shows."""
        return ("eval_loss", *(f"eval_{metric.value}" for metric in self.spec.evaluation.metrics or []))

    @abstractmethod
    def measure(self, trainer: JobTrainer, beat: Callable[[], None]) -> Measured:
        """The model as it is now, on held-out rows; `beat` is called between batches and may raise to end it."""

    def baseline(self) -> Measured | None:
        """What to compare with where the untrained model can say nothing; None: the untrained model itself."""
        return None

    @property
    def samples(self) -> list[Sample]:
        """Held-out prompts that `measure` has the model answer."""
        return []

    @abstractmethod
    def probe(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Inputs of a few rows, without labels, on which what is delivered must answer as what was trained."""

    @abstractmethod
    def examples(self, count: int) -> Iterable[dict[str, torch.Tensor]]:
        """See Loaded.examples."""
