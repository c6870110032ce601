"""The manifest of a checkpoint: what makes it complete, whose it is, and what it fits to."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import Field, ValidationError

from finetune_api.common import Message
from finetune_api.contract import CheckpointRef
from finetune_trainer.errors import UsageError

MANIFEST_FILE = "manifest.json"
TENSORS_SUFFIX = ".safetensors"
STEP_FOLDER = re.compile(r"/step-(\d{8})/")


class FileEntry(Message):
    """One file of a checkpoint."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    size: int = Field(ge=0, description="Bytes.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rank: int | None = Field(None, description="Whose part of the state it is; None: every rank needs it.")


class Manifest(Message):
    """Written after all files of the step are in the bucket, never before."""

    format: int = Field(1, description="Version of this layout.")
    step: int = Field(ge=0)
    job: str
    uid: str = Field(description="UID of the FineTuneJob: a namesake's checkpoints are not ours.")
    attempt: int = Field(description="Incarnation that wrote it; a writer of an older one is fenced off by it.")
    world_size: int
    base_digest: str = Field(description="Digest of the frozen base that the trainable part belongs to.")
    created: str = Field("", description="RFC 3339, UTC; set when the step is complete.")
    best: int | None = Field(None, description="The step with the best evaluation until then, where that counts.")
    files: list[FileEntry] = []
    versions: dict[str, str] = {}

    def ref(self, root: str) -> CheckpointRef:
        """How status and progress name this checkpoint."""
        return CheckpointRef(uri=step_uri(root, self.step), step=self.step, time=self.created)

    @classmethod
    def parse(cls, data: bytes) -> Manifest | None:
        """The manifest, or None where the bytes are none: half-written or somebody else's file."""
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError:
            return None
        return manifest if manifest.files else None

    def refuse_foreign(self, uid: str, root: str) -> None:
        """Raise UsageError when this is a checkpoint of another job than that of the uid."""
        if self.uid != uid:
            raise UsageError(
                f"spec.output.uri: {root} holds checkpoints of another job ({self.job}, uid {self.uid})",
                "name another output.uri, or delete that folder if its content is no longer needed",
            )

    def needed(self, files: Sequence[FileEntry], ranks: range, world_size: int) -> list[FileEntry]:
        """Those of the files that these ranks of so many need: of the parts their own, all where they divide anew."""
        return [file for file in files if world_size != self.world_size or file.rank is None or file.rank in ranks]


def step_uri(root: str, step: int) -> str:
    """Folder of a step under `<output.uri>/checkpoints`."""
    return f"{root.rstrip('/')}/step-{step:08d}"


def step_of(uri: str) -> int | None:
    """The step to whose folder this object belongs, or None."""
    match = STEP_FOLDER.search(uri)
    return int(match.group(1)) if match else None
