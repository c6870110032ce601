"""Containers that run before the trainer, and as whom the pods run, in Kubernetes' own words."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune_api.common import Message, cel, form, keyed_by, rules
from finetune_api.names import Text, dns_label
from finetune_api.quantities import Quantity, quantity


class SELinuxOptions(Message):
    """SELinux labels."""

    level: Text | None = Field(None, description="Level.")
    role: Text | None = Field(None, description="Role.")
    type: Text | None = Field(None, description="Type.")
    user: Text | None = Field(None, description="User.")


class PodSecurityContext(Message):
    """As whom the pods run; that they are restricted (not root, no capabilities, seccomp) cannot be changed."""

    run_as_user: int | None = Field(None, ge=1, le=2_147_483_647, description="User; absent: 65532.")
    run_as_group: int | None = Field(None, ge=1, le=2_147_483_647, description="Group; absent: 65532.")
    fs_group: int | None = Field(None, ge=1, le=2_147_483_647, description="Group of the volumes; absent: 65532.")
    fs_group_change_policy: Literal["Always", "OnRootMismatch"] | None = Field(
        None, description="When volumes are given to that group; absent: OnRootMismatch."
    )
    supplemental_groups: list[int] | None = Field(
        None, max_length=16, description="Further groups, such as those that may read a shared file system."
    )
    se_linux_options: SELinuxOptions | None = Field(None, description="SELinux labels.")


VARIABLE_NAME = form("^[A-Za-z_][A-Za-z0-9_]*$", "the name of a variable has letters, digits and '_' only")
MOUNT_PATH = form("^/[^:]+$", "mountPath must be an absolute path without ':'")


class Variable(Message):
    """An environment variable with a plain value."""

    name: str = Field(
        max_length=128,
        description="Name of the variable.",
        json_schema_extra=rules(VARIABLE_NAME),
    )
    value: str = Field("", max_length=4096, description="Its value; secrets belong into a Secret, as a volume.")


class Mount(Message):
    """Where a container sees a volume."""

    name: str = Field(max_length=63, description="Name of a volume in podTemplate.volumes.")
    mount_path: str = Field(
        max_length=512,
        description="Folder in the container.",
        json_schema_extra=rules(MOUNT_PATH),
    )
    sub_path: str | None = Field(None, max_length=512, description="Folder of the volume that is mounted.")
    read_only: bool | None = Field(None, description="Mount it read-only.")


class Amounts(Message):
    """Amounts of processors and memory."""

    cpu: Quantity | None = Field(None, description="Processors.", json_schema_extra=quantity())
    memory: Quantity | None = Field(None, description="Memory.", json_schema_extra=quantity())


class ContainerResources(Message):
    """What a container asks for, and what it gets at most."""

    requests: Amounts | None = Field(None, description="What it asks for.")
    limits: Amounts | None = Field(None, description="What it gets at most.")


class InitContainer(Message):
    """A container that must have ended well before the trainer starts; as restricted as the trainer is."""

    name: str = Field(
        max_length=63,
        description="Unique among the containers.",
        json_schema_extra=rules(
            dns_label("container"),
            cel("self != 'trainer'", "this is the trainer's own name; choose another"),
        ),
    )
    image: str = Field(min_length=1, max_length=512, description="Its image.")
    command: list[Text] | None = Field(None, max_length=32, description="Program; absent: the image's.")
    args: list[Text] | None = Field(None, max_length=64, description="Its arguments; absent: the image's.")
    env: list[Variable] | None = Field(
        None, max_length=32, description="Its environment.", json_schema_extra=keyed_by("name")
    )
    volume_mounts: list[Mount] | None = Field(
        None, max_length=16, description="The volumes that it sees.", json_schema_extra=keyed_by("mountPath")
    )
    resources: ContainerResources | None = Field(None, description="Processors and memory.")
