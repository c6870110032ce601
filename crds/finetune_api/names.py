"""Names and labels as Kubernetes allows them: an invalid one is refused with the job, not with its pods."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.common import cel, form, rules

NAME = "[a-z]([-a-z0-9]*[a-z0-9])?"
"""Name of a FineTuneJob: a DNS label, since pods and services are called after it."""
NAME_MAX_LENGTH = 45
"""Leaves room for what is appended to a child's name within the 63 characters of a DNS label."""

ObjectName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=253,
        json_schema_extra=rules(
            form(
                "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
                "must be the name of an object: small letters, digits, '-' and '.', a letter or digit at both ends",
            )
        ),
    ),
]


def dns_label(what: str) -> dict[str, str]:
    """The form of the name of a part of a pod."""
    return form("^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", f"the name of a {what} has small letters, digits and '-' only")


LABEL_KEY = "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
LABEL_VALUE = "^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"
LABELS = cel(
    f"self.all(key, key.matches('{LABEL_KEY}') && self[key].matches('{LABEL_VALUE}'))",
    "must be labels: letters, digits, '-', '_' and '.' in keys (after an optional prefix/) and in values, at most 63 "
    "of them, a letter or digit at both ends",
)
LabelValue = Annotated[str, Field(max_length=63)]
LabelKey = Annotated[str, Field(min_length=1, max_length=317)]
Text = Annotated[str, Field(max_length=253)]
