"""What is delivered: written, uploaded, read back from the bucket and proven to be what was trained."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune_api.job import FineTuneJobSpec
from finetune_trainer import verification
from finetune_trainer.consolidation import save_numbers
from finetune_trainer.errors import StoppedError
from finetune_trainer.gathering import put, trainable_state, whole
from finetune_trainer.model import Source, load_config
from finetune_trainer.rereading import Rereading
from finetune_trainer.storage import Store
from finetune_trainer.strategies.base import AdapterStrategy, ModelStrategy, save_without_weights
from finetune_trainer.tensors import Located

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from finetune_trainer.runtime import Context
    from finetune_trainer.session import Session
    from finetune_trainer.tensors import Numbers

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Expected:
    """What a model in shards has answered, before rank 0 got all of it.

    Attributes:
        probe: on the CPU.
    """

    probe: verification.Probe
    logits: torch.Tensor


def collect(context: Context, session: Session, rebuild: Callable[[], PreTrainedModel]) -> Expected:
    """Give rank 0 what it delivers of a model in shards; a collective, after which the others may let go of theirs.

    A whole model goes to its files, tensor by tensor. An adapter goes into its base, which rank 0 builds anew, to read
    it block by block: of this base nothing is gathered. The moments are given up before.

    Args:
        rebuild: gives the model as it was before training; called on rank 0 alone.

    Raises:
        StoppedError: the pod must go; on all ranks alike.
        VerificationError: the adapted base does not answer as the one in shards.
    """
    trainer, strategy = session.trainer, session.strategy
    probe = session.task.probe(trainer.model)
    with trainer.accelerator.autocast():
        logits = verification.logits(trainer.model, probe)
    trainer.optimizer.state.clear()
    expected = Expected({name: tensor.cpu() for name, tensor in probe.items()}, logits)
    if isinstance(strategy, ModelStrategy):
        folder = _fresh(context.scratch, strategy.output_kind) if context.is_main else None
        strategy.export_shards(trainer.model, folder, stored(session), partial(_go_on, context))
    else:
        _collect_adapter(session, rebuild, expected)
    return expected


def _go_on(context: Context) -> None:
    if context.stop.agreed():
        raise StoppedError("stopped on request while the model was gathered; its last step is saved")
    context.reporter.beat()


def _collect_adapter(session: Session, rebuild: Callable[[], PreTrainedModel], expected: Expected) -> None:
    trainer = session.trainer
    model = rebuild() if trainer.args.should_save else None
    if model is not None:
        _hold_what_learns(model)
    targets = trainable_state(model, trainer.learning) if model is not None else {}
    for name, tensor in trainable_state(trainer.model, trainer.learning).items():
        found = whole(tensor)
        if model is not None:
            put(targets[name], found)
    if model is None:
        return
    here = {name: tensor.to(model.device) for name, tensor in expected.probe.items()}
    verification.same(
        expected.logits, verification.logits(model, here), session.compute.dtype, "the base with the adapter"
    )
    trainer.model = model


def _hold_what_learns(model: PreTrainedModel) -> None:
    """Give room to what has one number for all, since it is read anew when it is needed."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.contiguous()


def stored(session: Session) -> torch.dtype:
    """The precision in which the base lies in its folder."""
    return session.config.dtype or torch.float32


def _fresh(scratch: Path, kind: str) -> Path:
    folder = scratch / "export" / kind
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@dataclass(frozen=True)
class Exporter:
    """Delivers the trained model of a session to the output's folder.

    Args:
        alive: called between the steps of an export, and while files are on their way; raises when the pod must go.
        collected: what the model in shards has answered, where there is one.
    """

    store: Store
    spec: FineTuneJobSpec
    session: Session
    scratch: Path
    alive: Callable[[], None]
    collected: Expected | None

    def deliver(self, card: Callable[[str], str]) -> Path:
        """Deliver the adapter or model, and with output.merge the merged model; the session's model is used up.

        Args:
            card: gives the model card, in Markdown, for `adapter` or `model`.

        Returns:
            A folder on this machine with what lies in the output's.

        Raises:
            TrainerError: what can be read back is not what was trained.
        """
        strategy, model = self.session.strategy, self.session.trainer.model
        kind = strategy.output_kind
        if isinstance(strategy, ModelStrategy) and self.collected:
            return self._deliver_collected(strategy, model, self.collected, card(kind))
        folder = _fresh(self.scratch, kind)
        strategy.export(model, folder, self.spec.model.uri, stored(self.session))
        self._write_beside(folder, model, card(kind))
        delivered = self._round_trip(folder, kind)
        probe = self.session.task.probe(model)
        if isinstance(strategy, ModelStrategy):
            strategy.refuse_untrained(model, self.session.base.folder, delivered)
            self._verify_model(model, delivered, probe)
            return delivered
        assert isinstance(strategy, AdapterStrategy), "there are no others"
        verification.adapter(strategy, model, delivered, probe, self.session.compute.dtype)
        if self.spec.output.merge:
            self.alive()
            self._deliver_merged(strategy, delivered, {name: tensor.cpu() for name, tensor in probe.items()}, card)
        return delivered

    def _deliver_collected(
        self, strategy: ModelStrategy, model: PreTrainedModel, expected: Expected, card: str
    ) -> Path:
        """The files are written; they are read back block by block, since the model may not fit in here whole."""
        folder = self.scratch / "export" / strategy.output_kind
        self._write_beside(folder, model, card)
        delivered = self._round_trip(folder, strategy.output_kind)
        session = self.session
        again = self._skeleton(load_config(delivered, self.spec.model), torch.float32)
        # From here on it stands for the one that was trained, whose shards may go.
        session.trainer.model = again
        strategy.refuse_untrained(again, session.base.folder, delivered)
        device = session.trainer.accelerator.device
        Rereading(again, Located(again, delivered), torch.float32, device, self.alive)
        here = {name: tensor.to(device) for name, tensor in expected.probe.items()}
        with session.trainer.accelerator.autocast():
            found = verification.logits(again, here)
        verification.same(expected.logits, found, self._lowest_precision, self._uri("model"))
        return delivered

    def _uri(self, kind: str) -> str:
        return f"{self.spec.output.uri.rstrip('/')}/{kind}"

    @property
    def _lowest_precision(self) -> torch.dtype:
        return max(stored(self.session), self.session.compute.dtype, key=verification.TOLERANCE.__getitem__)

    def _verify_model(self, model: PreTrainedModel, delivered: Path, probe: verification.Probe) -> None:
        expected = verification.logits(model, probe)
        attention = self.session.compute.attention
        again = self._load(delivered, stored(self.session), attention, model.config).to(model.device)
        verification.same(expected, verification.logits(again, probe), self._lowest_precision, self._uri("model"))

    def _deliver_merged(
        self, strategy: AdapterStrategy, adapter: Path, probe: verification.Probe, card: Callable[[str], str]
    ) -> None:
        """Merge into the base in float32, as it was before any quantisation: a 4-bit base would lose the update.

        Neither the base nor what comes of it is ever held whole.
        """
        uri, precision = self._uri("model"), stored(self.session)
        source, config = self.session.base.folder, self.session.config
        base = self._skeleton(config, torch.float32)
        located = Located(base, source, self.session.task.fresh)
        reading = Rereading(base, located, torch.float32, CPU, self.alive)
        adapted = strategy.together(base, adapter)
        expected = verification.logits(adapted, probe)
        reading.let_go()
        numbers = strategy.merged(adapted, located)
        verification.same(expected, self._answer(config, numbers, torch.float32, probe), torch.float32, uri)
        folder = _fresh(self.scratch, "model")
        model = self._skeleton(config, precision)
        model._weight_conversions = located.conversions
        save_without_weights(model, folder, precision)
        save_numbers(model, numbers, precision, folder, self.alive)
        # The trained one knows where answers end.
        self._write_beside(folder, self.session.trainer.model, card("model"))
        expected = self._answer(config, numbers, precision, probe)
        delivered = self._round_trip(folder, "model")
        verification.differs_from(source, delivered)
        config = load_config(delivered, self.spec.model)
        back = Located(self._skeleton(config, precision), delivered)
        verification.same(expected, self._answer(config, back, precision, probe), precision, uri)

    def _skeleton(self, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        config = copy.deepcopy(config)
        config.dtype = dtype
        source = Source(self.session.base.folder, self.spec.model, config, dtype, self.session.compute.attention)
        return self.session.task.skeleton(source).model

    def _answer(
        self, config: PretrainedConfig, numbers: Numbers, dtype: torch.dtype, probe: verification.Probe
    ) -> torch.Tensor:
        model = self._skeleton(config, dtype)
        reading = Rereading(model, numbers, dtype, CPU, self.alive)
        found = verification.logits(model, probe)
        reading.let_go()
        return found

    def _load(self, folder: Path, dtype: torch.dtype, attention: str, config: PretrainedConfig) -> PreTrainedModel:
        return self.session.task.load(Source(folder, self.spec.model, config, dtype, attention)).model

    def _write_beside(self, folder: Path, model: PreTrainedModel, card: str) -> None:
        self.session.processor.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        (folder / "README.md").write_text(card, "utf-8")

    def _round_trip(self, folder: Path, kind: str) -> Path:
        """Upload a folder, and bring it back from the bucket."""
        uri = self._uri(kind)
        # What an attempt before this one left, under names that this one may not use, would be part of the model.
        self.store.delete([info.uri for info in self.store.list(uri + "/")])
        self.store.upload_folder(folder, uri, self._moving)
        self.alive()
        back = self.scratch / "delivered" / kind
        shutil.rmtree(back, ignore_errors=True)
        self.store.download(uri + "/", back, self._moving)
        return self.store.folder(uri + "/", back)

    def _moving(self, *_: int) -> None:
        self.alive()
