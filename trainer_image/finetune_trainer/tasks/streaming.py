"""Streams in the trainers of Hugging Face: our own order instead of theirs, and the position in the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from finetune_trainer.data.splits import TRAINING
from finetune_trainer.data.stream import Feed, Stream

if TYPE_CHECKING:
    from transformers import Trainer as _Base
    from transformers import TrainerControl, TrainerState, TrainingArguments
else:
    _Base = object


class StreamCallback(TrainerCallback, ExportableState):
    """Keeps the position of the stream in the checkpoint, and the epoch true: the library knows no end of a stream."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self._state = state
        self._feed: Feed | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader[Any] | None = None,
        **_: Any,
    ) -> None:
        assert train_dataloader is not None
        assert isinstance(train_dataloader.dataset, Feed)
        self._feed = train_dataloader.dataset
        if self._state:
            self._feed.resume(self._state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self._feed is not None
        state.epoch = self._feed.epoch

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self._feed is not None
        self._feed.close()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"state": self._feed.state() if self._feed else self._state}, "attributes": {}}


class StreamingMixin(_Base):
    """Mix in before a Trainer class: a Stream as train_dataset is divided over the ranks by itself, and resumed."""

    _feed: Feed | None = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        if not isinstance(self.train_dataset, Stream):
            return super().get_train_dataloader()
        self.close_stream()
        self._feed = Feed(self.train_dataset, self.args.process_index, self.args.world_size)
        # Not prepared by accelerate, which would divide what is divided already, and fetch a batch too many.
        return DataLoader(
            self._feed,
            batch_size=self._train_batch_size,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="training"),
            pin_memory=torch.cuda.is_available() and self.args.dataloader_pin_memory,
            # Of its own: opening a loader draws a number, which a resumed run would miss in its dropout.
            generator=torch.Generator(),
        )

    def close_stream(self) -> None:
        """End the threads and processes of a stream."""
        if self._feed is not None:
            self._feed.close()

    def counted(self, report: dict[str, Any]) -> dict[str, Any]:
        """The data's report with what a stream has read by now: this rank's rows, where each encodes its own."""
        if self._feed is None:
            return report
        counts = self._feed.tally.counts()
        return report | {
            "rows": {TRAINING: counts["rows"]} | report["rows"],
            "warnings": [*report["warnings"], *self._feed.warnings()],
            TRAINING: report.get(TRAINING, {}) | counts | {"epochs": round(self._feed.epoch, 3)},
        }

    def _load_callback_state(self) -> None:
        # The library puts restored callbacks behind the others: progress would be told before the epoch is known.
        order = [type(callback) for callback in self.callback_handler.callbacks]
        super()._load_callback_state()
        self.callback_handler.callbacks.sort(key=lambda callback: order.index(type(callback)))
