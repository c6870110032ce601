"""What the run reads: the model's files and the dataset's files, on this machine or as they lie in the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from finetune_api.contract import Stage
from finetune_api.job import DatasetSpec
from finetune_trainer.data.sources import NamedFile
from finetune_trainer.errors import DataError, UsageError
from finetune_trainer.model import ModelFile, digest, needed
from finetune_trainer.model_cache import ModelCache
from finetune_trainer.runtime import Context
from finetune_trainer.storage import MissingError, ObjectInfo, Store

FETCHED = ("s3://", "hf://")
"""Addresses of what has to be brought here before it can be read."""


@dataclass(frozen=True)
class BaseFiles:
    """The base model's folder, and the name of exactly this content."""

    folder: Path
    digest: str


@dataclass(frozen=True)
class StoredFile:
    """A dataset file that is read where it lies; should it be replaced meanwhile, reading it is refused."""

    store: Store
    info: ObjectInfo

    @property
    def name(self) -> str:
        return self.info.uri

    @property
    def size(self) -> int:
        return self.info.size

    @property
    def version(self) -> str:
        return self.info.etag

    def open(self, scattered: bool) -> BinaryIO:
        return self.store.open(self.info.uri, scattered=scattered, info=self.info)


def model_files(store: Store, uri: str, refuse: Callable[[set[str]], None]) -> dict[ModelFile, str]:
    """The files of a model that are needed, with their addresses.

    Args:
        uri: the model's folder.
        refuse: raises UsageError when the names of the files show that something is missing.

    Raises:
        UsageError: there is no model that can be trained.
    """
    folder = uri.rstrip("/") + "/"
    try:
        infos = store.list(folder)
        names = {ModelFile(info.uri.removeprefix(folder), info.size, info.etag): info.uri for info in infos}
        files = needed([file for file in names if "/" not in file.name], uri)
        refuse({file.name for file in files})
    except MissingError as error:
        raise UsageError(f"spec.model.uri: {error.message}", error.advice) from error
    return {file: names[file] for file in files}


def fetch_model(context: Context, store: Store, uri: str, refuse: Callable[[set[str]], None]) -> BaseFiles:
    """Bring the model's files here, into the job's cache where it has one; those of volumes and folders stay where they
    are.

    Args:
        uri: spec.model.uri, or what it means for ever.
        refuse: raises UsageError when the names of the files show that something is missing.

    Raises:
        UsageError: there is no model that can be trained.
    """
    uri = uri.rstrip("/")
    files = model_files(store, uri, refuse)

    def fetch(folder: Path) -> None:
        for file, address in files.items():
            store.download(address, folder, _reported(context, f"model {file.name}"))

    name = digest(files)
    cache = ModelCache.of(context) if uri.startswith(FETCHED) else None
    cached = cache.folder(name, uri, fetch) if cache is not None else None
    if cached is not None:
        return BaseFiles(cached, name)
    folder = context.scratch / "model"
    fetch(folder)
    return BaseFiles(store.folder(uri + "/", folder), name)


def fetch_dataset(context: Context, store: Store) -> tuple[list[NamedFile] | list[StoredFile], list[NamedFile]]:
    """Bring the files of the dataset, and of the held-out one where it has an address of its own.

    The files of a stream are listed and stay where they are.

    Raises:
        DataError: an address means no file.
    """
    spec: DatasetSpec = context.job.spec.dataset
    held_out = spec.validation.uri if spec.validation else None
    with named_field("dataset.uri"):
        files = _streamed(store, spec.uri) if spec.streaming else _fetched(context, store, spec.uri, "dataset")
    if held_out is None:
        return files, []
    with named_field("dataset.validation.uri"):
        return files, _fetched(context, store, held_out, "validation")


def fetch_beside(context: Context, store: Store, field: str, uri: str) -> Path:
    """Bring one JSON file, or the weights of a model's folder, here.

    Args:
        field: what names the address, such as `spec.strategy.select.angle.from`.

    Raises:
        UsageError: there is no such file, or no weights in the folder.
    """
    folder = context.scratch / "beside"
    try:
        if uri.endswith(".json"):
            (path,) = store.download(uri, folder, _reported(context, "angles"))
            return path
        infos = [info for info in store.list(uri.rstrip("/") + "/") if info.uri.endswith(".safetensors")]
        for info in infos:
            store.download(info.uri, folder, _reported(context, "fine-tuned model"))
    except MissingError as error:
        raise UsageError(f"{field}: {error.message}", error.advice) from error
    if not infos:
        raise UsageError(f"{field}: {uri} holds no *.safetensors", "name a model's folder, or an angles.json")
    return store.folder(uri.rstrip("/") + "/", folder)


def _streamed(store: Store, uri: str) -> list[StoredFile]:
    return [StoredFile(store, info) for info in store.require(uri)]


def _fetched(context: Context, store: Store, uri: str, name: str) -> list[NamedFile]:
    infos = store.list(uri)
    paths = store.download(uri, context.scratch / name, _reported(context, name))
    return [NamedFile(info.uri, path) for info, path in zip(infos, paths, strict=True)]


@contextmanager
def named_field(field: str) -> Iterator[None]:
    """What is missing is the fault of the field that named it."""
    try:
        yield
    except MissingError as error:
        raise DataError(f"spec.{field}: {error.message}", error.advice) from error


def _reported(context: Context, what: str) -> Callable[[int, int, int, int], None]:
    def report(done: int, total: int, files: int, all_files: int) -> None:
        context.stop.check()
        shown = f"{what} {files}/{all_files} files, {done / 2**20:,.1f} of {total / 2**20:,.1f} MiB"
        context.reporter.stage(Stage.DOWNLOADING, shown)

    return report
