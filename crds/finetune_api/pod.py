"""The parts of a pod that a job may add, in Kubernetes' own words.

They are handed on as they are written, so they stay plain dictionaries; these types are their schema. Nothing here
is left open: CEL cannot compare what a schema does not know, and an immutable field would only seem to be one.
Volumes that reach the node (hostPath) are missing on purpose: whoever may create a FineTuneJob is not thereby
allowed to read nodes.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from finetune_api.common import UNIQUE, As, Message, cel, keyed_by, ruled, rules
from finetune_api.containers import MOUNT_PATH, VARIABLE_NAME, InitContainer, Mount, PodSecurityContext, Variable
from finetune_api.names import LABEL_KEY, LABELS, LabelValue, ObjectName, Text, dns_label

RESERVED_VOLUMES = "^(job|scratch|tmp|shm|ca-bundle|model-cache|claim-[0-9]+)$"
"""Names of the volumes that every trainer pod has anyway."""
RESERVED_PATHS = "^/(etc/finetune|etc/finetune-ca|scratch|tmp|dev/shm|volumes|model-cache)(/.*)?$"
"""Where they are mounted."""
RESERVED_VARIABLES = (
    "^((FINETUNE|PET|AWS)_.*|HOME|USER|XDG_CACHE_HOME|HF_HOME|HF_ENDPOINT|HF_TOKEN|HF_HUB_OFFLINE|"
    "HF_HUB_DISABLE_TELEMETRY|DO_NOT_TRACK|HF_HUB_DISABLE_IMPLICIT_TOKEN|TORCHINDUCTOR_CACHE_DIR|TRITON_CACHE_DIR|PYTHONUNBUFFERED|PYTHONDONTWRITEBYTECODE|"
    "TOKENIZERS_PARALLELISM)$"
)
"""Variables that the operator sets: one of these in a job would be taken and then lost."""


class EmptyDir(Message):
    """A folder that lives as long as the pod."""

    medium: str | None = Field(None, max_length=32, description="Memory: a RAM disk. Absent: the node's disk.")
    size_limit: str | None = Field(None, max_length=32, description="Such as 10Gi.")


class KeyToPath(Message):
    """A key and the file that it becomes."""

    key: str = Field(max_length=253, description="The key.")
    path: str = Field(max_length=512, description="Path below the mount.")
    mode: int | None = Field(None, ge=0, le=511, description="Permission bits.")


class ConfigMapVolume(Message):
    """The keys of a ConfigMap as files."""

    name: ObjectName = Field(description="The ConfigMap.")
    items: list[KeyToPath] | None = Field(None, max_length=64, description="Absent: every key.")
    default_mode: int | None = Field(None, ge=0, le=511, description="Permission bits.")
    optional: bool | None = Field(None, description="Start without it.")


class SecretVolume(Message):
    """The keys of a Secret as files."""

    secret_name: ObjectName = Field(description="The Secret.")
    items: list[KeyToPath] | None = Field(None, max_length=64, description="Absent: every key.")
    default_mode: int | None = Field(None, ge=0, le=511, description="Permission bits.")
    optional: bool | None = Field(None, description="Start without it.")


class ClaimVolume(Message):
    """A PersistentVolumeClaim."""

    claim_name: ObjectName = Field(description="The claim.")
    read_only: bool | None = Field(None, description="Mount it read-only.")


class CsiVolume(Message):
    """A volume that a CSI driver makes for the pod."""

    driver: ObjectName = Field(description="The driver.")
    read_only: bool | None = Field(None, description="Mount it read-only.")
    fs_type: str | None = Field(None, max_length=32, description="File system.")
    volume_attributes: dict[str, Text] | None = Field(None, max_length=32, description="What the driver asks for.")


SOURCES = ("emptyDir", "configMap", "secret", "persistentVolumeClaim", "csi")


class Volume(Message):
    """A volume of the pods: a name and one source."""

    model_config = ruled(
        cel(
            f"[{', '.join(f'has(self.{source})' for source in SOURCES)}].filter(given, given).size() == 1",
            f"a volume needs exactly one source; set one of {', '.join(SOURCES)}",
        )
    )

    name: str = Field(
        max_length=63,
        description="Unique among the volumes.",
        json_schema_extra=rules(
            dns_label("volume"),
            cel(f"!self.matches('{RESERVED_VOLUMES}')", "this volume is there anyway; give yours another name"),
        ),
    )
    empty_dir: EmptyDir | None = Field(None, description="A folder that lives as long as the pod.")
    config_map: ConfigMapVolume | None = Field(None, description="The keys of a ConfigMap as files.")
    secret: SecretVolume | None = Field(None, description="The keys of a Secret as files.")
    persistent_volume_claim: ClaimVolume | None = Field(None, description="A PersistentVolumeClaim.")
    csi: CsiVolume | None = Field(None, description="A volume that a CSI driver makes for the pod.")


class VolumeMount(Mount):
    """Where the trainer sees a volume."""

    mount_path: str = Field(
        max_length=512,
        description="Folder in the container.",
        json_schema_extra=rules(
            MOUNT_PATH,
            cel(f"!self.matches('{RESERVED_PATHS}')", "the trainer itself uses this path; mount yours elsewhere"),
        ),
    )


class EnvVar(Variable):
    """An environment variable of the trainer."""

    name: str = Field(
        max_length=128,
        description="Name of the variable.",
        json_schema_extra=rules(
            VARIABLE_NAME,
            cel(
                f"!self.matches('{RESERVED_VARIABLES}')",
                "this variable is set by the operator; remove it (S3 is set by storage.s3)",
            ),
        ),
    )


class PodTemplate(Message):
    """Additions to the pods; the product's own settings cannot be taken away."""

    model_config = ruled(
        cel(
            "self.volumeMounts.all(mount, self.volumes.exists(volume, volume.name == mount.name))",
            "volumeMounts may only name volumes of podTemplate.volumes; add the volume or remove the mount",
        ),
        cel(
            "self.initContainers.all(container, !has(container.volumeMounts) || container.volumeMounts.all(mount, "
            "self.volumes.exists(volume, volume.name == mount.name)))",
            "initContainers may only mount volumes of podTemplate.volumes; add the volume or remove the mount",
        ),
    )

    labels: dict[str, LabelValue] = Field(
        {},
        max_length=32,
        description="Labels of the pods.",
        json_schema_extra=rules(
            LABELS,
            cel(
                "!self.exists(key, key.matches('^(finetune[.]dev|app[.]kubernetes[.]io|batch[.]kubernetes[.]io)/'))",
                "labels under finetune.dev/, app.kubernetes.io/ and batch.kubernetes.io/ are set by the operator; "
                "choose other keys",
            ),
        ),
    )
    annotations: dict[str, Annotated[str, Field(max_length=4096)]] = Field(
        {},
        max_length=32,
        description="Annotations of the pods.",
        json_schema_extra=rules(
            cel(
                f"self.all(key, key.matches('{LABEL_KEY}'))",
                "keys of annotations have letters, digits, '-', '_' and '.', after an optional prefix/",
            ),
            cel(
                "!self.exists(key, key.startsWith('finetune.dev/'))",
                "annotations under finetune.dev/ are set by the operator; choose other keys",
            ),
        ),
    )
    env: list[EnvVar] = Field(
        [], max_length=64, description="Environment of the trainer.", json_schema_extra=keyed_by("name")
    )
    volumes: list[Annotated[dict[str, Any], As(Volume)]] = Field(
        [], max_length=16, description="Volumes of the pods.", json_schema_extra=keyed_by("name")
    )
    volume_mounts: list[Annotated[dict[str, Any], As(VolumeMount)]] = Field(
        [], max_length=16, description="Where the trainer sees them.", json_schema_extra=keyed_by("mountPath")
    )
    image_pull_secrets: list[ObjectName] = Field(
        [],
        max_length=8,
        description="Secrets for the registry of the trainer's image.",
        json_schema_extra=UNIQUE,
    )
    security_context: Annotated[dict[str, Any], As(PodSecurityContext)] | None = Field(
        None, description="As whom the pods run: for shared file systems, and clusters that assign users."
    )
    init_containers: list[Annotated[dict[str, Any], As(InitContainer)]] = Field(
        [],
        max_length=4,
        description="Containers that run before the trainer, one after the other.",
        json_schema_extra=keyed_by("name"),
    )
