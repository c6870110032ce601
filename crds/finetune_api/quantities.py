"""Amounts as Kubernetes writes them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from finetune_api.common import cel, rules

AMOUNT = "([1-9][0-9]*([.][0-9]+)?|0[.][0-9]*[1-9][0-9]*)(m|k|Ki|M|Mi|G|Gi|T|Ti)?"
Quantity = Annotated[
    str,
    # People write `cpu: 2`; Kubernetes takes it for "2", so it is taken here.
    BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string"}], "maxLength": 32}),
]


def quantity(also: str = "") -> dict[str, Any]:
    """The form of a Quantity, or one word beside it."""
    pattern = f"^({also}|{AMOUNT})$" if also else f"^{AMOUNT}$"
    hint = f"{also} or a quantity" if also else "a quantity"
    return rules(
        cel(
            f"type(self) == string ? self.matches('{pattern}') : self > 0",
            f"must be {hint} above 0, such as 2, 500m, 16Gi or 1.5T",
        )
    )
