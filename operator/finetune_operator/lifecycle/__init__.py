"""(job, observed, now) -> status and the next action. Pure: no clock, no network."""

from finetune_operator.lifecycle.chain import HOPELESS
from finetune_operator.lifecycle.decide import decide
from finetune_operator.lifecycle.decision import (
    Action,
    Create,
    Decision,
    Delete,
    Expire,
    ForgetStart,
    Free,
    Notice,
    Number,
    Remove,
    Resume,
    Suspend,
)
from finetune_operator.lifecycle.ending import refused, unreadable

__all__ = [
    "HOPELESS",
    "Action",
    "Create",
    "Decision",
    "Delete",
    "Expire",
    "ForgetStart",
    "Free",
    "Notice",
    "Number",
    "Remove",
    "Resume",
    "Suspend",
    "decide",
    "refused",
    "unreadable",
]
