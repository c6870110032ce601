"""How a refused spec is written down: what is changed in a good one, and the words in which it is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tests.api.jobs import changed, minimal
from tests.api.sensible import Object


@dataclass(frozen=True)
class Refusal:
    """One problem and no other: `says` is the whole of it, its path first."""

    name: str
    changes: dict[str, Any]
    says: str
    of: Object = field(default_factory=minimal)
    """The job that is changed."""

    @property
    def job(self) -> Object:
        return changed(self.of, self.changes)


HYPER = "spec.hyperparameters"
POD = "spec.podTemplate"
A_NAME = "must be the name of an object: small letters, digits, '-' and '.', a letter or digit at both ends"
LABELS = (
    "must be labels: letters, digits, '-', '_' and '.' in keys (after an optional prefix/) and in values, at most 63 "
    "of them, a letter or digit at both ends"
)
AN_AMOUNT = "must be a quantity above 0, such as 2, 500m, 16Gi or 1.5T"
A_GPU = {"spec.resources.gpusPerNode": 1}


def quoted(value: Any) -> str:
    return json.dumps(value)


def outside(path: str, value: Any, bound: str) -> Refusal:
    return Refusal(
        f"{path} {value}", {path: value}, f"{path}: Invalid value: {value}: {path} in body should be {bound}"
    )


def not_yet(path: str, value: Any, instead: str, name: str = "") -> Refusal:
    what = name or path.removeprefix("spec.")
    return Refusal(f"{what} not yet", {path: value}, f"{path}: Forbidden: {what} is not supported yet; {instead}")


def only(path: str, value: Any, what: str, allowed: str) -> Refusal:
    says = f'{path}: Invalid value: "{value}": this {what} is not supported yet; use one of {allowed}'
    return Refusal(f"{what} {value}", {path.removesuffix("[0]"): [value] if path.endswith("]") else value}, says)
