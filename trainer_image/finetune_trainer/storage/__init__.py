"""Stored data: S3 buckets, volumes and folders behind one interface, `Store`."""

from finetune_trainer.storage.batch import Progress
from finetune_trainer.storage.checksums import file_crc32
from finetune_trainer.storage.errors import (
    ChangedError,
    CorruptError,
    DiskFullError,
    MissingContainerError,
    MissingError,
)
from finetune_trainer.storage.s3 import ObjectInfo
from finetune_trainer.storage.settings import TransferSettings
from finetune_trainer.storage.store import Store
from finetune_trainer.storage.upload import Uploaded

__all__ = [
    "ChangedError",
    "CorruptError",
    "DiskFullError",
    "MissingContainerError",
    "MissingError",
    "ObjectInfo",
    "Progress",
    "Store",
    "TransferSettings",
    "Uploaded",
    "file_crc32",
]
