"""How places are written: buckets, volumes, folders."""

from __future__ import annotations

from finetune_api.common import form
from finetune_api.names import NAME

CLAIM = "pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?"
MODEL_URI = form(
    f"^(s3://[^/]+/.+|hf://[^/@]+/[^/@]+(@[^/@]+)?|{CLAIM}(/.*)?|file:///.+|job://{NAME})$",
    "must be s3://bucket/prefix, hf://org/name@revision, pvc://claim/path, file:///path or job://name",
)
DATA_URI = form(
    f"^(s3://[^/]+(/.*)?|{CLAIM}(/.*)?|file:///.+)$",
    "must be s3://bucket/prefix, pvc://claim/path or file:///path; a file, a glob or a prefix",
)
OUTPUT_URI = form(
    f"^(s3://[^/]+/.+|{CLAIM}/.+|file:///.+)$",
    "must be a prefix of its own: s3://bucket/prefix, pvc://claim/path or file:///path",
)
