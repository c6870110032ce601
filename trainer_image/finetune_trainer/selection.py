"""From a part of a model, as a spec names it, to the names of its parameters."""

from __future__ import annotations

from collections.abc import Collection

from finetune_api.selection import Layers, ModelPart, ModuleKind
from finetune_trainer.errors import UsageError
from finetune_trainer.structure import Place, Structure


def chosen(structure: Structure, part: ModelPart, field: str) -> set[str]:
    """Names of the parameters that lie in a part of the model.

    Args:
        field: where the part stands, such as `spec.strategy.select`.

    Raises:
        UsageError: a block or a kind of module that the model does not have, or a part with nothing in it.
    """
    numbers = None if part.layers is None else _numbers(structure, part.layers, f"{field}.layers")
    for kind in part.modules or ():
        refuse_missing(structure, kind, f"{field}.modules")
    names = {name for name, place in structure.places.items() if _lies_in(place, numbers, part.modules)}
    if not names:
        wanted = ", ".join(kind.value for kind in part.modules or ())
        raise UsageError(f"{field}: blocks {_listed(numbers or ())} have no {wanted}", _advice(structure))
    return names


def _lies_in(place: Place, numbers: Collection[int] | None, kinds: Collection[ModuleKind] | None) -> bool:
    if kinds is not None and place.kind not in kinds:
        return False
    # What lies in no block is outside of all that layers can name, unless it is named by its kind.
    return numbers is None or place.layer in numbers or (place.layer is None and kinds is not None)


def _numbers(structure: Structure, layers: Layers, field: str) -> set[int]:
    count = structure.layers
    if count == 0:
        raise UsageError(f"{field}: the model has no blocks", _advice(structure))
    for name, wanted in (("first", layers.first), ("last", layers.last)):
        if wanted is not None and wanted > count:
            raise UsageError(f"{field}.{name} is {wanted}, but the model has only {count} blocks", f"use {count}")
    unknown = [index for index in layers.indices or () if index >= count]
    if unknown:
        raise UsageError(
            f"{field}.indices: there is no block {unknown[0]}; the model has blocks 0 to {count - 1}",
            "count from 0, at the input",
        )
    if layers.indices is not None:
        return set(layers.indices)
    return set(range(layers.first)) if layers.first is not None else set(range(count - (layers.last or 0), count))


def refuse_missing(structure: Structure, kind: ModuleKind, field: str, instead: str = "use") -> None:
    """Raise UsageError, with what there is, when the model has no module of a kind."""
    if kind in structure.kinds:
        return
    why = ""
    if kind is ModuleKind.LAYER_NORM:
        why = f" (its norms are {_listed(structure.norms)})" if structure.norms else " (it has no norms at all)"
    elif kind is ModuleKind.HEAD and structure.shares_embedding:
        why = " of its own (its output shares the weights of Embedding)"
    raise UsageError(f"{field}: the model has no {kind.value}{why}", _advice(structure, instead))


def _advice(structure: Structure, instead: str = "use") -> str:
    """Kinds that the model has, each with one of its modules, and its blocks."""
    kinds = [f"{kind.value} (such as {structure.example(kind)})" for kind in ModuleKind if kind in structure.kinds]
    blocks = f"layers with blocks 0 to {structure.layers - 1}" if structure.layers else ""
    return f"{instead} {'; or '.join(filter(None, [', '.join(kinds), blocks]))}"


def _listed(items: Collection[int] | Collection[str]) -> str:
    return ", ".join(map(str, sorted(items)))
