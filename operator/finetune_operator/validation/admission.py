"""What happens to an object at the door of an API server: pruned, defaulted, checked. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune_api.contract import GROUP
from finetune_api.crd import job_schema
from finetune_api.schema import Schema
from finetune_operator.cluster.port import InvalidError, Object
from finetune_operator.validation.defaulting import OF_THE_SERVER, apply_defaults, prune
from finetune_operator.validation.problems import Problem
from finetune_operator.validation.rules import ABSENT, check_rules
from finetune_operator.validation.values import check


def admit(obj: Object, old: Object | None = None) -> Object:
    """The FineTuneJob as an API server would store it: without unknown fields, with all defaults.

    Args:
        obj: the object to create, or as it is to be.
        old: the stored object when this is an update; rules about changes are asked only then.

    Raises:
        InvalidError: in the API server's words, all problems at once.
    """
    found = completed(obj)
    name = obj["metadata"]["name"]
    if problems := list(problems_of(found, old)):
        raise InvalidError(f'{obj["kind"]}.{GROUP} "{name}" is invalid: {_joined(problems)}')
    return found


def completed(obj: Mapping[str, Any]) -> Object:
    """The object without what the schema does not know, and with its defaults."""
    schema = job_schema()
    kept = {name: obj[name] for name in OF_THE_SERVER if name in obj}
    rest = {name: value for name, value in obj.items() if name not in OF_THE_SERVER}
    found: Object = {**kept, **apply_defaults(prune(rest, schema), _beside_metadata(schema))}
    return found


def problems_of(obj: Object, old: Object | None = None) -> Iterator[Problem]:
    """What an API server has against a completed object, which has a name by then. Rules are asked where types hold."""
    schema = job_schema()
    found = list(check(obj, schema))
    yield from found
    if not any(problem.blocking for problem in found):
        yield from check_rules(obj, schema, ABSENT if old is None else completed(old))


def _beside_metadata(schema: Schema) -> Schema:
    properties = {name: child for name, child in schema["properties"].items() if name not in OF_THE_SERVER}
    return {**schema, "properties": properties}


def _joined(problems: list[Problem]) -> str:
    words = [str(problem) for problem in problems]
    return words[0] if len(words) == 1 else f"[{', '.join(words)}]"
