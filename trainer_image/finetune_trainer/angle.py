"""Fine-tuned angles: how far a fine-tuning has turned the weights of every block's attention and feed-forward part."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field, TypeAdapter, ValidationError

from finetune_api.common import Message
from finetune_api.selection import AngleOrder, AngleSelection, ModuleKind
from finetune_trainer import tensors
from finetune_trainer.errors import UsageError
from finetune_trainer.structure import Structure
from finetune_trainer.tensors import Located

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "angles.json"
RANKED = (ModuleKind.ATTENTION, ModuleKind.FEED_FORWARD)
CHUNK = 1 << 14
"""Elements that are held in float64 at a time: what stays in a core's cache takes a twelfth of the time."""

PartKey = tuple[int, ModuleKind]
Pairs = Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]


class Angle(Message):
    """The angle of one part of a block."""

    layer: int
    kind: ModuleKind
    angle: float = Field(
        description="Between the weights before and after, all tensors of the part as one vector, in "
        "degrees: 0 for what was not touched."
    )
    parameters: int


class OtherModelError(UsageError):
    """Two folders hold models whose blocks differ, so that nothing can be compared."""


def parts_of(structure: Structure) -> dict[PartKey, list[str]]:
    """Names of the parameters of every block's attention and feed-forward part; norms belong to neither."""
    parts: defaultdict[PartKey, list[str]] = defaultdict(list)
    for name, place in structure.places.items():
        if place.layer is not None and place.kind in RANKED:
            parts[place.layer, place.kind].append(name)
    return dict(sorted(parts.items(), key=lambda part: (part[0][0], RANKED.index(part[0][1]))))


def measure(model: PreTrainedModel, before: Path, after: Path, beat: Callable[[], None] = lambda: None) -> list[Angle]:
    """The angles between two folders of weights, of the same architecture; read tensor by tensor, twice.

    The angle of two checkpoints' weights as the measure of what a fine-tuning has changed is from arXiv 2312.15681.

    Args:
        model: of that architecture; with whatever weights and head.
        beat: called between the parts; may raise.

    Raises:
        OtherModelError: a folder lacks tensors of the model's blocks, or has them in other shapes.
        UsageError: weights that are not finite.
    """
    old, new = Located(model, before), Located(model, after)
    found: list[Angle] = []
    for (layer, kind), names in parts_of(Structure.of(model)).items():
        beat()
        matches = [pair for name in names for pair in zip(*_matching(old, new, name), strict=True)]
        turned = math.degrees(angle_between(lambda matches=matches: ((old[a], new[b]) for a, b in matches)))
        if not math.isfinite(turned):
            raise UsageError(f"the weights of block {layer}'s {kind.value} are not finite in {before} or {after}")
        size = sum(math.prod(tensors.shape(old.index, key)) for key, _ in matches)
        found.append(Angle(layer=layer, kind=kind, angle=turned, parameters=size))
    return found


def angle_between(pairs: Pairs) -> float:
    """The angle of two vectors that come in pairs of pieces, in radians; 0 where both are zero.

    2 atan2(|u/|u| - v/|v||, |u/|u| + v/|v||), in float64 (W. Kahan, "How Futile are Mindless Assessments of Roundoff in
    Floating-Point Computation?", 2006): arccos of the cosine, the textbook's way, has no correct digit below
    1e-8, and fine-tuning turns weights by little.

    Args:
        pairs: gives the pieces anew at every call; it is called twice.
    """
    squares = torch.zeros(2, dtype=torch.float64)
    for u, v in _chunks(pairs):
        squares += torch.stack([u.square().sum(), v.square().sum()])
    scale = [1 / length if length > 0 else 0.0 for length in squares.sqrt().tolist()]
    apart = torch.zeros(2, dtype=torch.float64)
    for u, v in _chunks(pairs, *scale):
        apart += torch.stack([(u - v).square().sum(), (u + v).square().sum()])
    difference, total = apart.sqrt().tolist()
    return 2 * math.atan2(difference, total)


def _chunks(pairs: Pairs, *scale: float) -> Iterator[list[torch.Tensor]]:
    for pair in pairs():
        for pieces in zip(*(tensor.flatten().split(CHUNK) for tensor in pair), strict=True):
            yield [piece.double() * factor for piece, factor in zip(pieces, scale or (1.0, 1.0), strict=True)]


def _matching(old: Located, new: Located, name: str) -> tuple[list[str], list[str]]:
    for side in (old, new):
        if name not in side.keys:
            raise OtherModelError(f"{side.folder} has no weights for {name}", "compare models with the same blocks")
    shapes = [[tensors.shape(side.index, key) for key in side.keys[name]] for side in (old, new)]
    if shapes[0] != shapes[1]:
        raise OtherModelError(
            f"{name} has shape {shapes[0]} in {old.folder}, but {shapes[1]} in {new.folder}",
            "compare models with the same blocks",
        )
    return old.keys[name], new.keys[name]


_ANGLES = TypeAdapter(list[Angle])


def to_json(angles: Sequence[Angle]) -> str:
    """The content of angles.json."""
    return _ANGLES.dump_json(list(angles), by_alias=True, indent=1).decode()


def read(path: Path, field: str) -> list[Angle]:
    """The angles in a file; raises UsageError naming the field where they are none."""
    try:
        return _ANGLES.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{field}: {path.name} does not hold angles: {where} {first['msg']}".replace(":  ", ": "),
            f"name the {FILE} that a job leaves in its report, or a model's folder",
        ) from error


def first_parts(
    structure: Structure, names: set[str], angles: Sequence[Angle], select: AngleSelection, field: str
) -> set[str]:
    """Of some parameters those that lie in the attention and feed-forward parts that the angles rank first.

    Of equal angles the block nearer to the input comes first, and in it attention.

    Args:
        field: where the selection by angle stands, such as `spec.strategy.select.angle`.

    Raises:
        UsageError: the angles are those of another architecture, or there are not so many parts.
    """
    parts = parts_of(structure)
    _refuse_foreign(structure, parts, angles, f"{field}.from")
    candidates = [part for part, members in parts.items() if not names.isdisjoint(members)]
    if select.top_k > len(candidates):
        raise UsageError(
            f"{field}.topK is {select.top_k}, but only {len(candidates)} attention and feed-forward parts are chosen",
            f"set topK to at most {len(candidates)}, or choose more layers and modules",
        )
    turned = {(angle.layer, angle.kind): angle.angle for angle in angles}
    # Sorting is stable, and the candidates stand in the order of the model.
    sign = 1 if select.order is AngleOrder.SMALLEST else -1
    ranking = sorted(candidates, key=lambda part: sign * turned[part])
    return names & {name for part in ranking[: select.top_k] for name in parts[part]}


def _refuse_foreign(structure: Structure, parts: dict[PartKey, list[str]], angles: Sequence[Angle], field: str) -> None:
    sizes = {name: parameter.numel() for name, parameter in structure.model.named_parameters()}
    here = {part: sum(sizes[name] for name in names) for part, names in parts.items()}
    there = {(angle.layer, angle.kind): angle.parameters for angle in angles}
    for layer, kind in sorted({*here, *there}):
        if here.get((layer, kind)) != there.get((layer, kind)):
            found, own = there.get((layer, kind), 0), here.get((layer, kind), 0)
            raise UsageError(
                f"{field}: these angles are another architecture's: {kind.value} of block {layer} has {found:,} "
                f"parameters there and {own:,} here",
                "name a fine-tuning of the same base",
            )
