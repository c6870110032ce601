"""What is looked at, in the order in which it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.contract import ExitCode
from finetune_api.job import FineTuneJob, FineTuneJobSpec, InvalidRowPolicy
from finetune_api.task import LANGUAGE
from finetune_trainer.data.sources import NamedFile
from finetune_trainer.data.splits import TRAINING
from finetune_trainer.errors import DataError, TrainerError, UsageError
from finetune_trainer.estimate.simulation import simulate
from finetune_trainer.inputs import StoredFile, model_files, named_field
from finetune_trainer.model import load_config, size_in_words
from finetune_trainer.preflight.network import check_names
from finetune_trainer.preflight.sample import sample
from finetune_trainer.preview import preview
from finetune_trainer.runtime import Pod
from finetune_trainer.storage import Store
from finetune_trainer.strategies import strategy_of
from finetune_trainer.tasks import Inputs, Task, task_of

WEIGHTS = ".safetensors"
GIB = 2**30


@dataclass
class Findings:
    """What is well, in sentences without a full stop, and what people should know though the job can start."""

    told: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Preflight:
    """One look at a job.

    Args:
        job: a resolved one.
    """

    job: FineTuneJob
    store: Store
    pod: Pod
    findings: Findings = field(default_factory=Findings)

    def run(self) -> Findings:
        """Everything that is to be found.

        Raises:
            TrainerError: the job cannot work, with the exit code that says why.
        """
        spec = self._spec()
        task = task_of(spec)
        if spec.resources.nodes > 1:
            self._tell(check_names(self.pod.master_addr))
        folder = self._model(task)
        self._output()
        self._data(task)
        self._training(folder)
        self._memory(folder)
        return self.findings

    def _spec(self) -> FineTuneJobSpec:
        """As if nothing were streamed: the sample lies here."""
        spec = self.job.spec
        return spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"streaming": False})})

    def _model(self, task: Task) -> Path:
        """A folder with all of the model but its weights."""
        spec, folder = self.job.spec, self.pod.scratch / "model"
        files = model_files(self.store, spec.model.uri, task.refuse_files)
        folder.mkdir(parents=True, exist_ok=True)
        for file, uri in files.items():
            if not file.name.endswith(WEIGHTS):
                (folder / file.name).write_bytes(self.store.read_bytes(uri))
        config = load_config(folder, spec.model)
        task.check(config, strategy_of(spec.strategy).virtual_tokens)
        task.read_processor(folder, config)
        size = sum(file.size for file in files)
        self._tell(f"the model ({config.model_type}, {size / GIB:,.1f} GiB) is there")
        return folder

    def _output(self) -> None:
        uri = self.job.spec.output.uri
        try:
            self.store.probe_write(uri)
        except TrainerError as error:
            if error.exit_code is not ExitCode.SOFTWARE:
                raise
            raise UsageError(f"spec.output.uri: {uri} cannot be written: {error.message}", "name another") from error
        self._tell("the output can be written")

    def _data(self, task: Task) -> None:
        """Read and mask rows, all of a small dataset and some of a large one."""
        files, whole = self._sample("dataset.uri", self.job.spec.dataset.uri)
        validation = self.job.spec.dataset.validation
        held_out: list[NamedFile] = []
        if validation is not None and validation.uri is not None:
            held_out, _ = self._sample("dataset.validation.uri", validation.uri)
        try:
            prepared = task.prepare(Inputs(self.store, files, held_out, self.pod.scratch))
        except DataError as error:
            if whole or self._is_certain():
                raise
            self.findings.warnings.append(f"of the rows that were looked at: {error.message}")
            return
        self.findings.warnings += prepared.report.get("warnings", [])
        self._tell(_rows_in_words(prepared.report.get(TRAINING, {}), len(prepared.train), whole))
        if whole:
            self._enough(len(prepared.train))

    def _is_certain(self) -> bool:
        """Whether what is wrong with some rows is wrong with the dataset: classes may all be elsewhere."""
        spec = self.job.spec
        return spec.task.type in LANGUAGE and spec.dataset.on_invalid_row is InvalidRowPolicy.FAIL

    def _sample(self, name: str, uri: str) -> tuple[list[NamedFile], bool]:
        with named_field(name):
            files = [StoredFile(self.store, info) for info in self.store.require(uri)]
        return sample(files, self.job.spec.task.type, self.pod.scratch / "sample" / name)

    def _enough(self, rows: int) -> None:
        """Rows for all ranks."""
        spec = self.job.spec
        world, values = spec.resources.ranks, spec.hyperparameters
        if rows < world:
            raise UsageError(
                f"spec.resources: {world} processes share {rows} rows for training, and each needs one",
                "lower resources.nodes or gpusPerNode, or add data",
            )
        batch = world * values.per_device_batch_size * values.gradient_accumulation_steps
        if rows < batch:
            self.findings.warnings.append(
                f"a step takes {batch} rows (of {world} processes, perDeviceBatchSize and gradientAccumulationSteps), "
                f"and the dataset has {rows} for training: an epoch is one step that is not full"
            )

    def _training(self, folder: Path) -> None:
        found = preview(self.job.spec, folder)
        trainable, total = size_in_words(found.trainable), size_in_words(found.total)
        self._tell(f"{trainable} of {total} parameters learn ({found.share:.3g} of them)")

    def _memory(self, folder: Path) -> None:
        """A warning at most: it is an estimate."""
        least = self._least_ranks()
        found = simulate(self.job, folder, [least] if least else [])
        own, *fewer = found.estimates
        needs, product = own.memory.needs / GIB, self.job.spec.resources.gpu_product
        how = f"{own.sharding.value} on {own.world_size} process{'es' if own.world_size > 1 else ''}"
        if found.gpu_memory is None:
            self._tell(f"{how} needs an estimated {needs:.1f} GiB each")
            return
        has = f"an estimated {needs:.1f} GiB each, and {product} has {found.gpu_memory / GIB:.1f} GiB"
        if found.advice:
            self.findings.warnings.append(f"{how} needs {has}: {found.advice}")
        else:
            self._tell(f"{how} needs {has}")
        for estimate in fewer:
            if estimate.memory.needs > found.gpu_memory:
                self.findings.warnings.append(
                    f"on distributed.minNodes {self.job.spec.distributed.min_nodes} each of {estimate.world_size} "
                    f"processes needs an estimated {estimate.memory.needs / GIB:.1f} GiB, which {product} has not: "
                    "raise minNodes"
                )

    def _least_ranks(self) -> int | None:
        """Of an elastic job that found no room for more."""
        resources, least = self.job.spec.resources, self.job.spec.distributed.min_nodes
        return resources.processes * least if least else None

    def _tell(self, sentence: str) -> None:
        print(sentence, flush=True)
        self.findings.told.append(sentence)


def _rows_in_words(tally: dict[str, Any], rows: int, whole: bool) -> str:
    """What was read, and how much of it is learned."""
    if tally.get("sample"):
        print(f"the first row, with [[ ]] around what is learned:\n{tally['sample']}", flush=True)
    which = "rows for training" if whole else "rows of a sample for training"
    if "learnedShare" not in tally:
        return f"the data has {rows:,} {which}"
    return f"the data has {rows:,} {which}, {tally['learnedShare']:.0%} of {tally['tokens']:,} tokens are learned"
