"""(job, observed, now) -> status and the next action. Pure: no clock, no network."""

from finetune_operator.lifecycle.chain import HOPELESS
from finetune_operator.lifecycle.conditions import was_taken_back
from finetune_operator.lifecycle.decide import decide
from finetune_operator.lifecycle.decision import (
    Action,
    Create,
    CreatePreflight,
    Decision,
    Delete,
    DeletePreflight,
    Expire,
    ForgetStart,
    Free,
    Notice,
    Number,
    Remove,
    Resume,
    Shrink,
    Suspend,
    WorkloadAction,
)
from finetune_operator.lifecycle.ending import refused, unreadable
from finetune_operator.lifecycle.preflight import is_due

__all__ = [
    "HOPELESS",
    "Action",
    "Create",
    "CreatePreflight",
    "Decision",
    "Delete",
    "DeletePreflight",
    "Expire",
    "ForgetStart",
    "Free",
    "Notice",
    "Number",
    "Remove",
    "Resume",
    "Shrink",
    "Suspend",
    "WorkloadAction",
    "decide",
    "is_due",
    "refused",
    "unreadable",
    "was_taken_back",
]
