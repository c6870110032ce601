"""An S3 service that the pods and this machine reach by one URL."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import boto3
import torch
from botocore.config import Config
from safetensors.torch import load

from tests.e2e.cluster import Object
from tests.support.jobs import write_rows
from tests.support.models import greetings, save_tiny_llama


class ClusterS3:
    """The service, and what jobs are told of it."""

    def __init__(self, endpoint: str, access_key: str, secret_key: str) -> None:
        self.endpoint = endpoint
        self.keys = {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key}

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.keys["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )

    def storage(self) -> Object:
        """A job's spec.storage."""
        return {"s3": {"endpoint": self.endpoint, "pathStyle": True, "secretName": "bucket-keys"}}

    def secret(self, namespace: str) -> Object:
        """What a job's spec.storage speaks of."""
        metadata = {"name": "bucket-keys", "namespace": namespace}
        return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": self.keys}

    def fresh_bucket(self) -> Bucket:
        name = f"e2e-{secrets.token_hex(4)}"
        self.client().create_bucket(Bucket=name)
        return Bucket(self, name)


class Bucket:
    """One of its buckets, made by a test."""

    def __init__(self, s3: ClusterS3, name: str) -> None:
        self.s3 = s3
        self.name = name
        self._client = s3.client()

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def upload(self, folder: Path) -> None:
        """Put all files of a folder there, by their paths below it."""
        for path in folder.rglob("*"):
            if path.is_file():
                self._client.upload_file(str(path), self.name, path.relative_to(folder).as_posix())

    def download(self, prefix: str, folder: Path) -> Path:
        """A copy of what lies under a prefix, by the paths below it; the folder that holds it."""
        for key in self.keys(prefix):
            path = folder / key.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(key))
        return folder

    def keys(self, prefix: str = "") -> set[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return {item["Key"] for page in pages for item in page.get("Contents", ())}

    def read(self, key: str) -> bytes:
        body: bytes = self._client.get_object(Bucket=self.name, Key=key)["Body"].read()
        return body

    def put(self, key: str, content: bytes) -> None:
        self._client.put_object(Bucket=self.name, Key=key, Body=content)

    def json(self, key: str) -> Object:
        found: Object = json.loads(self.read(key))
        return found

    def weights(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of a safetensors file."""
        return load(self.read(key))


def with_small_inputs(s3: ClusterS3, folder: Path) -> Bucket:
    """A bucket with a tiny model and conversations; folder is for making them."""
    save_tiny_llama(folder / "model")
    write_rows(folder / "data.jsonl", greetings(64))
    bucket = s3.fresh_bucket()
    bucket.upload(folder)
    return bucket
