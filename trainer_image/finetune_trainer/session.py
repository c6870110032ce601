"""From the spec to a trainer that is ready: files, processor, rows, model, strategy, task."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import set_seed

from finetune_api.contract import Stage
from finetune_api.job import Weights
from finetune_api.run import Sharding
from finetune_trainer.arguments import accumulation, common_arguments, global_batch, refuse_what_cannot_work
from finetune_trainer.callbacks import CourseCallback, ProgressCallback, StopCallback, StopwatchCallback
from finetune_trainer.collectives import all_say, assemble, first_says, in_turn
from finetune_trainer.data.prepared import Prepared
from finetune_trainer.data.stream import Stream
from finetune_trainer.errors import UnavailableError
from finetune_trainer.estimate.estimate import Estimator
from finetune_trainer.estimate.sharding import choose_sharding
from finetune_trainer.estimate.sketch import Sketch
from finetune_trainer.evaluation.course import Watch
from finetune_trainer.groups import peak_rates, spared
from finetune_trainer.hardware import Compute
from finetune_trainer.inputs import FETCHED, BaseFiles, fetch_beside, fetch_dataset, fetch_model
from finetune_trainer.learning import LeanRecomputationCallback, await_what_learns
from finetune_trainer.model import Source, load_config, override_dropout, parameter_counts, size_in_words
from finetune_trainer.quantization import store_as
from finetune_trainer.rereading import reread
from finetune_trainer.sharding import keep_off_device, loading_once_a_node, shard
from finetune_trainer.statistics import hold_frozen_statistics
from finetune_trainer.strategies import Strategy, strategy_of
from finetune_trainer.tasks import Inputs, Task, task_of
from finetune_trainer.tasks.streaming import StreamCallback
from finetune_trainer.unfreezing import unfreeze

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from finetune_trainer.loaded import Loaded
    from finetune_trainer.result import Output
    from finetune_trainer.runtime import Context
    from finetune_trainer.storage import Store
    from finetune_trainer.tasks.trainer import JobTrainer

Load = Callable[[Source], "Loaded"]


@dataclass(frozen=True)
class Session:
    """Everything that training and delivery need.

    Attributes:
        config: the base's configuration as it was read, with what the spec and the data have changed.
        processor: tokenizer or image processor, delivered beside the weights.
        parameters: (trainable, all).
        sharding: how several ranks hold the model; None where there is one rank.
    """

    base: BaseFiles
    config: PretrainedConfig
    compute: Compute
    strategy: Strategy
    task: Task
    processor: Any
    prepared: Prepared
    parameters: tuple[int, int]
    sharding: Sharding | None
    trainer: JobTrainer


@dataclass(frozen=True)
class Start:
    """What is known before anything is downloaded; `open` does the rest."""

    context: Context
    store: Store
    output: Output
    task: Task
    strategy: Strategy
    compute: Compute

    @classmethod
    def of(cls, context: Context, store: Store, output: Output) -> Start:
        """Refuse what this machine cannot do.

        Raises:
            UsageError: hyper-parameters or precision that cannot work here.
        """
        spec = context.job.spec
        compute = Compute.of(spec)
        refuse_what_cannot_work(spec.hyperparameters, compute.hardware)
        return cls(context, store, output, task_of(spec), strategy_of(spec.strategy), compute)

    def fetch(self) -> BaseFiles:
        """The base model's files; raises UsageError when they are no model that can be trained."""
        with in_turn(self.context, "model"):
            return fetch_model(self.context, self.store, self._place(), self.task.refuse_files)

    def _place(self) -> str:
        """Where the model is, for all attempts: a branch of a hub may go on, a job's base may not."""
        context, spec = self.context, self.context.job.spec.model
        if not spec.uri.startswith("hf://"):
            return spec.uri
        pinned = self.output.pinned()
        if pinned is None:
            pinned = self.store.pin(spec.uri)
            if context.is_main:
                self.output.keep_pin(pinned)
        return pinned

    def open(self, base: BaseFiles) -> Session:
        """Prepare everything up to the first step.

        Raises:
            TrainerError: what the spec asks for cannot work, with the field's name.
        """
        spec, task = self.context.job.spec, self.task
        config = load_config(base.folder, spec.model)
        task.check(config, self.strategy.virtual_tokens)
        override_dropout(config, spec.hyperparameters.dropout)
        processor = task.read_processor(base.folder, config)
        with in_turn(self.context, "data"):
            prepared = self._prepare()
            task.configure(config)
            self.strategy.gather(partial(fetch_beside, self.context, self.store), base.folder)
        assemble(self.context, cuda=self.compute.hardware.cuda)
        self._refuse_different(base)
        sharding = self._sharding(base)
        loaded = self._model(base, config, sharding, task.load)
        self.context.stop.check()
        parameters = parameter_counts(loaded.model)
        self._tell(parameters)
        trainer = self._trainer(loaded, prepared, sharding)
        return Session(
            base, config, self.compute, self.strategy, task, processor, prepared, parameters, sharding, trainer
        )

    def rebuild(self, session: Session) -> PreTrainedModel:
        """The model as it was before training, for what training has learned to be put into it.

        A quantised base is held whole, another one is read from its files block by block, anew in every pass.
        """
        quantized = self.strategy.quantization(self.compute.dtype) is not None
        load = self.task.load if quantized else partial(reread, self.task, self.context.alive)
        return self._model(session.base, copy.deepcopy(session.config), None, load).model

    def _sharding(self, base: BaseFiles) -> Sharding | None:
        """How several ranks share the work, the same on all; None where there is one rank."""
        context, spec, compute = self.context, self.context.job.spec, self.compute
        if context.world_size == 1:
            return None

        def choose() -> Sharding:
            estimator = Estimator(partial(Sketch.of, spec, base.folder, compute.dtype))
            fits_replicated = partial(estimator.fits_replicated, context.world_size)
            memory = compute.hardware.memory(spec.resources.processes)
            return choose_sharding(spec, context.world_size, memory, fits_replicated)

        asked = spec.distributed.sharding
        sharding = first_says(choose) if asked is Sharding.AUTO else asked
        context.reporter.update(sharding=sharding)
        words = "replicated (DDP)" if sharding is Sharding.DDP else "in shards (FSDP)"
        context.reporter.stage(Stage.LOADING, f"{context.world_size} ranks hold the model {words}")
        return sharding

    def _refuse_different(self, base: BaseFiles) -> None:
        """Every node has fetched for itself; what was replaced in between may differ."""
        uri = self.context.job.spec.model.uri
        if uri.startswith(FETCHED) and len(set(all_say(base.digest))) > 1:
            raise UnavailableError(
                f"{uri} was replaced while the nodes were fetching it",
                "the next attempt reads the new one; name a commit, as in hf://org/name@commit, to rule it out",
            )

    def _prepare(self) -> Prepared:
        context = self.context
        files, validation_files = fetch_dataset(context, self.store)
        context.stop.check()
        context.reporter.stage(Stage.PREPARING)

        def progress(part: str, rows: int) -> None:
            context.stop.check()
            context.reporter.stage(Stage.PREPARING, f"{part} rows: {rows:,}")

        prepared = self.task.prepare(Inputs(self.store, files, validation_files, context.scratch, progress))
        for warning in prepared.report.get("warnings", []):
            context.reporter.warn(warning)
        return prepared

    def _model(self, base: BaseFiles, config: PretrainedConfig, sharding: Sharding | None, load: Load) -> Loaded:
        """The base as the strategy has prepared it; without its weights on ranks that get them with their shards."""
        context, strategy = self.context, self.strategy
        context.stop.check()
        spec = context.job.spec
        context.reporter.stage(Stage.LOADING, spec.model.uri)
        dtype, quantization = self.compute.dtype, strategy.quantization(self.compute.dtype)
        if quantization is not None and sharding is Sharding.FSDP:
            store_as(quantization, dtype)
        once_a_node = sharding is Sharding.FSDP and quantization is None
        # What the base does not have is drawn here, and then an adapter's first values.
        set_seed(spec.hyperparameters.seed)
        with loading_once_a_node() if once_a_node else nullcontext():
            loaded = load(
                Source(
                    base.folder,
                    spec.model,
                    config,
                    dtype=strategy.weights_dtype(dtype),
                    attention=self.compute.attention,
                    quantization=quantization,
                )
            )
        loaded = replace(loaded, compute=dtype, device=self.compute.hardware.device_of(context.local_rank))
        model = self._prepared_model(loaded)
        hold_frozen_statistics(model)
        self.task.finish(model)
        return replace(loaded, model=model)

    def _prepared_model(self, loaded: Loaded) -> PreTrainedModel:
        """The same one on all ranks: what is chosen by looking at data, rank 0 chooses."""
        strategy, seed = self.strategy, self.context.job.spec.hyperparameters.seed
        prepared = []

        def choose() -> dict[str, torch.Tensor]:
            strategy.restore(self.output.choice())
            set_seed(seed)
            prepared.append(strategy.prepare(loaded))
            if choice := strategy.choice():
                self.output.keep_choice(choice)
            return strategy.choice()

        if chosen := strategy.choice():
            # Built anew, by rank 0 alone.
            strategy.restore(chosen)
        elif strategy.chooses:
            strategy.restore(first_says(choose))
        if not prepared:
            set_seed(seed)
            prepared.append(strategy.prepare(loaded))
        return prepared[0]

    def _trainer(self, loaded: Loaded, prepared: Prepared, sharding: Sharding | None) -> JobTrainer:
        context, task, spec, model = self.context, self.task, self.context.job.spec, loaded.model
        common = common_arguments(spec, prepared, self.compute, context.scratch, context.world_size)
        if sharding is Sharding.FSDP:
            keep_off_device(model)
        watch = Watch.of(spec.evaluation) if spec.output.weights is Weights.BEST else None
        # First: the others are told the epoch that it knows.
        callbacks = [StreamCallback()] if isinstance(prepared.train, Stream) else []
        callbacks += [
            LeanRecomputationCallback(),
            ProgressCallback(context.reporter, task.metrics),
            CourseCallback(context.reporter, watch, spec.evaluation.early_stopping),
            # After what asks for evaluations and checkpoints: the stop overrules it.
            StopCallback(context.stop),
            StopwatchCallback(),
        ]
        learning = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        trainer = task.trainer(model, task.arguments(common, self.compute), callbacks)
        trainer.learning, trainer.watch = learning, watch
        trainer.rates = peak_rates(model, learning, spec.hyperparameters)
        trainer.undecayed = spared(model, spec.hyperparameters.no_weight_decay)
        if sharding is Sharding.FSDP:
            assert spec.distributed.fsdp is not None, "a resolved job has its options"
            shard(model, spec.distributed.fsdp, self.compute, context)
            trainer.adopt_shards()
        else:
            await_what_learns(trainer, task.probe)
        if spec.strategy.unfreezing is not None:
            unfreeze(trainer, loaded, spec.strategy.unfreezing, context.reporter)
        self.strategy.attach(trainer)
        return trainer

    def _tell(self, parameters: tuple[int, int]) -> None:
        trainable, total = parameters
        self.context.reporter.update(trainable_parameters=trainable, total_parameters=total)
        detail = f"{size_in_words(trainable)} of {size_in_words(total)} parameters learn"
        self.context.reporter.stage(Stage.LOADING, detail)
        self._tell_batch()

    def _tell_batch(self) -> None:
        """How many rows a step learns from: with several ranks a multiple of what the spec says of each."""
        context, spec, values = self.context, self.context.job.spec, self.context.job.spec.hyperparameters
        rows = global_batch(spec, context.world_size)
        context.reporter.update(
            world_size=context.world_size, global_batch_size=rows, peak_learning_rate=values.learning_rate
        )
        if context.world_size > 1:
            context.reporter.stage(
                Stage.LOADING,
                f"{context.world_size} ranks x {values.per_device_batch_size} rows x "
                f"{accumulation(spec, context.world_size)} micro-steps: {rows:,} rows a step, at a learning rate of "
                f"{values.learning_rate:g}",
            )
