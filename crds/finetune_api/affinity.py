"""Tolerations and affinities, in Kubernetes' own words; why they are typed, see finetune_api.pod."""

from __future__ import annotations

from enum import Enum

from pydantic import Field

from finetune_api.common import Message
from finetune_api.names import LabelKey, LabelValue, ObjectName


class TolerationOperator(str, Enum):
    EXISTS = "Exists"
    EQUAL = "Equal"


class TaintEffect(str, Enum):
    NO_SCHEDULE = "NoSchedule"
    PREFER_NO_SCHEDULE = "PreferNoSchedule"
    NO_EXECUTE = "NoExecute"


class Toleration(Message):
    """Lets the pods run on nodes with a taint."""

    key: LabelKey | None = Field(None, description="Key of the taint; absent, with operator Exists: every taint.")
    operator: TolerationOperator | None = Field(None, description="Absent: Equal.")
    value: LabelValue | None = Field(None, description="Value of the taint, with operator Equal.")
    effect: TaintEffect | None = Field(None, description="Effect of the taint; absent: every effect.")
    toleration_seconds: int | None = Field(
        None, ge=0, description="With effect NoExecute: how long a pod stays; absent: for ever."
    )


class NodeSelectorOperator(str, Enum):
    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"
    GT = "Gt"
    LT = "Lt"


class NodeSelectorRequirement(Message):
    """A condition on one label or field of a node."""

    key: LabelKey = Field(description="Label of the node.")
    operator: NodeSelectorOperator = Field(description="How the label is compared with the values.")
    values: list[LabelValue] | None = Field(
        None, max_length=64, description="With In and NotIn some, with Gt and Lt one."
    )


class NodeSelectorTerm(Message):
    """Conditions that must all hold."""

    match_expressions: list[NodeSelectorRequirement] | None = Field(
        None, max_length=16, description="Conditions on the node's labels."
    )
    match_fields: list[NodeSelectorRequirement] | None = Field(
        None, max_length=4, description="Conditions on the node's fields, such as metadata.name."
    )


class NodeSelector(Message):
    """Terms of which one must hold."""

    node_selector_terms: list[NodeSelectorTerm] = Field(min_length=1, max_length=16, description="The terms.")


class PreferredNodes(Message):
    """A wish for nodes, with its weight."""

    weight: int = Field(ge=1, le=100, description="Weight among the wishes.")
    preference: NodeSelectorTerm = Field(description="The nodes that are wished for.")


class NodeAffinity(Message):
    """Which nodes."""

    required_during_scheduling_ignored_during_execution: NodeSelector | None = Field(
        None, description="Nodes that are allowed."
    )
    preferred_during_scheduling_ignored_during_execution: list[PreferredNodes] | None = Field(
        None, max_length=16, description="Nodes that are preferred."
    )


class LabelSelectorOperator(str, Enum):
    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


class LabelSelectorRequirement(Message):
    """A condition on one label."""

    key: LabelKey = Field(description="The label.")
    operator: LabelSelectorOperator = Field(description="How it is compared with the values.")
    values: list[LabelValue] | None = Field(None, max_length=64, description="Some with In and NotIn, else none.")


class LabelSelector(Message):
    """Conditions on labels that must all hold."""

    match_labels: dict[str, LabelValue] | None = Field(None, max_length=32, description="Labels with these values.")
    match_expressions: list[LabelSelectorRequirement] | None = Field(None, max_length=16, description="Conditions.")


class PodAffinityTerm(Message):
    """Pods near which, or away from which, the pods are put."""

    label_selector: LabelSelector | None = Field(None, description="The other pods.")
    topology_key: LabelKey = Field(description="Label of nodes; equal values are near each other.")
    namespaces: list[ObjectName] | None = Field(
        None, max_length=16, description="Where the other pods are; absent: here."
    )
    namespace_selector: LabelSelector | None = Field(None, description="The same, by labels of namespaces.")


class PreferredPods(Message):
    """A wish for neighbours, with its weight."""

    weight: int = Field(ge=1, le=100, description="Weight among the wishes.")
    pod_affinity_term: PodAffinityTerm = Field(description="The neighbours.")


class PodAffinity(Message):
    """Which neighbours."""

    required_during_scheduling_ignored_during_execution: list[PodAffinityTerm] | None = Field(
        None, max_length=16, description="What must hold."
    )
    preferred_during_scheduling_ignored_during_execution: list[PreferredPods] | None = Field(
        None, max_length=16, description="What is preferred."
    )


class Affinity(Message):
    """Where the pods may and should run."""

    node_affinity: NodeAffinity | None = Field(None, description="By the nodes.")
    pod_affinity: PodAffinity | None = Field(None, description="Near other pods.")
    pod_anti_affinity: PodAffinity | None = Field(None, description="Away from other pods.")
