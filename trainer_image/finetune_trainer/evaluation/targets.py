"""What a head answers: one class, several, or a number. Its loss, what is measured of it, and the plainest guess."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from finetune_trainer.evaluation import tables

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHOWN = 50
"""Classes that a sentence names."""


class Target(ABC):
    """Of a head with one output for each label.

    Attributes:
        labels: names of the outputs, in their order.
    """

    problem_type: ClassVar[str]
    """Its name in the configurations of transformers."""
    guess: ClassVar[str]
    """What the plainest predictor answers, whatever the row."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)

    def fits(self, config: PretrainedConfig) -> bool:
        """Whether a head with this configuration answers the same, so that it can be kept.

        Names decide: another order or other names is another head. LABEL_0, LABEL_1, ..., which transformers gives
        where nobody has named the classes, say nothing of them; who knows what they are says so by task.labels.
        """
        return labels_in(config) == self.labels and self._same_problem(config)

    def _same_problem(self, config: PretrainedConfig) -> bool:
        return getattr(config, "problem_type", None) in (None, self.problem_type)

    @property
    @abstractmethod
    def answers(self) -> str:
        """What the outputs say, in a sentence."""

    def _named(self) -> str:
        shown = ", ".join(f"`{label}`" for label in self.labels[:SHOWN])
        return f"{len(self.labels)} classes: {shown}{', ...' if len(self.labels) > SHOWN else ''}"

    @abstractmethod
    def tensor(self, values: Iterable[Any]) -> torch.Tensor:
        """The labels of rows, as they are kept in the prepared data, as the loss takes them."""

    @abstractmethod
    def losses(self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        """The loss of each row, (rows,), from (rows, outputs)."""

    @abstractmethod
    def scores(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """What is measured, by scikit-learn, under the names of the API's Metric."""

    @abstractmethod
    def details(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """More for the report, as JSON."""

    @abstractmethod
    def constant(self, labels: torch.Tensor) -> torch.Tensor:
        """(outputs,): the answer that has the least loss on these labels without a look at the rows."""


class OneClass(Target):
    """Exactly one of the classes; labels are their numbers."""

    problem_type = "single_label_classification"
    guess = "majority class"

    @property
    def answers(self) -> str:
        return f"It tells which of {self._named()}."

    def tensor(self, values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.long)

    def losses(self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        return functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)

    def scores(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """accuracy, and the means over the classes that occur of precision, recall and f1."""
        return class_scores(labels.numpy(), logits.argmax(dim=-1).numpy())

    def details(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        truth, predicted = labels.numpy(), logits.argmax(dim=-1).numpy()
        return {
            "classes": tables.classes(self.labels, truth, predicted),
            **tables.confusion(self.labels, truth, predicted),
        }

    def constant(self, labels: torch.Tensor) -> torch.Tensor:
        """The logarithms of the classes' shares; a class without rows counts half of one, or its loss were infinite."""
        counts = torch.bincount(labels, minlength=len(self.labels)).double().clamp(min=0.5)
        return (counts / counts.sum()).log()


class AnyClasses(Target):
    """Any number of the classes, each for itself; labels are lists of their numbers."""

    problem_type = "multi_label_classification"
    guess = "majority of each class"

    @property
    def answers(self) -> str:
        return f"It tells which, if any, of {self._named()}. A class counts where its output is above 0."

    def tensor(self, values: Iterable[Sequence[int]]) -> torch.Tensor:
        """(rows, classes) of ones and zeros."""
        rows = list(values)
        found = torch.zeros(len(rows), len(self.labels))
        for row, numbers in enumerate(rows):
            found[row, list(numbers)] = 1.0
        return found

    def losses(self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        each = functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
        return each.mean(dim=-1)

    def scores(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """accuracy counts rows with exactly the right classes; precision, recall and f1 are means over the classes."""
        return class_scores(labels.int().numpy(), (logits > 0).int().numpy())

    def details(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        return {"classes": tables.classes(self.labels, labels.int().numpy(), (logits > 0).int().numpy())}

    def constant(self, labels: torch.Tensor) -> torch.Tensor:
        """The log-odds of each class, from half a row at least for either answer."""
        rows = len(labels)
        counts = labels.double().sum(dim=0).clamp(min=0.5, max=rows - 0.5)
        return (counts / (rows - counts)).log()


class Number(Target):
    """One number; labels are numbers."""

    problem_type = "regression"
    guess = "mean"

    @property
    def answers(self) -> str:
        return "It gives a number, in the unit of the labels."

    def __init__(self) -> None:
        # The name that transformers gives a single output.
        super().__init__(["LABEL_0"])

    def fits(self, config: PretrainedConfig) -> bool:
        """Any head with one output is kept: a number has no name by which to tell two of them apart."""
        return config.num_labels == 1 and self._same_problem(config)

    def tensor(self, values: Iterable[float]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.float32)

    def losses(self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        return functional.mse_loss(logits.float().squeeze(-1), labels.float(), reduction="none")

    def scores(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """mse, mae and r2; r2 needs two rows."""
        from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

        truth, predicted = labels.double().numpy(), logits.double().squeeze(-1).numpy()
        return {
            "mse": float(mean_squared_error(truth, predicted)),
            "mae": float(mean_absolute_error(truth, predicted)),
            "r2": float(r2_score(truth, predicted)),
        }

    def details(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        return {"points": tables.points(labels.numpy(), logits.squeeze(-1).numpy())}

    def constant(self, labels: torch.Tensor) -> torch.Tensor:
        return labels.double().mean()[None]


def labels_in(config: PretrainedConfig) -> tuple[str, ...]:
    """Names of the outputs of a model with this configuration; in JSON their numbers may stand in any order."""
    return tuple(name for _, name in sorted((config.id2label or {}).items()))


def class_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """accuracy, precision, recall and f1; (rows,) of class numbers, or (rows, classes) of ones and zeros."""
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0)
    accuracy = accuracy_score(truth, predicted)
    return {"accuracy": float(accuracy), "precision": float(precision), "recall": float(recall), "f1": float(f1)}
