"""A model that nobody holds whole, written as the files that the library writes of one, tensor by tensor.

Of one in shards no rank holds more at a time than one tensor, or the few that make up one in the file.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from huggingface_hub.constants import SAFETENSORS_WEIGHTS_FILE_PATTERN
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, apply_converters, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from finetune_trainer.gathering import whole
from finetune_trainer.layout import lay_out, size_of
from finetune_trainer.learning import let_go
from finetune_trainer.storage.files import require_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune_trainer.tensors import Numbers

LARGEST_FILE = "50GB"
"""As save_pretrained divides a model, so that who trains it in shards gets the same files."""


def save_shards(
    model: PreTrainedModel,
    dtype: torch.dtype,
    folder: Path | None,
    between: Callable[[], None],
    largest: str = LARGEST_FILE,
) -> None:
    """Write a whole model; a collective.

    Args:
        dtype: of its floating point weights in the files.
        folder: where to; None on ranks that only give their shards.
        between: called on every rank before each tensor; may raise, on all ranks alike.
        largest: size of a file; a single tensor may be larger.

    Raises:
        DiskFullError: the folder has no room; on the rank that writes.
    """
    let_go(model)
    state = model.state_dict()

    def take(names: list[str]) -> Iterable[tuple[str, torch.Tensor]]:
        return ((name, whole(state[name])) for name in names)

    _save(model, take, dtype, folder, between=between, largest=largest)


def save_numbers(
    model: PreTrainedModel, numbers: Numbers, dtype: torch.dtype, folder: Path, between: Callable[[], None]
) -> None:
    """Write a model whose numbers are elsewhere; of itself only names, shapes and types are looked at.

    Args:
        dtype: of its floating point weights in the files.
        between: called before each tensor; may raise.

    Raises:
        DiskFullError: the folder has no room.
    """
    _save(model, lambda names: numbers.take(names).items(), dtype, folder, between=between, largest=LARGEST_FILE)


def _save(
    model: PreTrainedModel,
    take: Callable[[list[str]], Iterable[tuple[str, torch.Tensor]]],
    dtype: torch.dtype,
    folder: Path | None,
    *,
    between: Callable[[], None],
    largest: str,
) -> None:
    shapes = _as_stored(model, model.state_dict(), dtype)
    files = _Files(model, folder, revert_weight_conversion(model, dict(shapes)), largest) if folder else None
    for names in _together(model, shapes):
        between()
        _write(take(names), dtype, model, files)


def _write(
    tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, model: PreTrainedModel, files: _Files | None
) -> None:
    gathered = {}
    for name, full in tensors:
        if files is not None:
            gathered[name] = full.to("cpu", _stored(full, dtype))
    if files is not None:
        for name, tensor in revert_weight_conversion(model, gathered).items():
            files.put(name, tensor)


def _stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() else tensor.dtype


def _as_stored(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Shapes and types of what is saved, by the names in the model: without what is shared or made anew."""
    ignored = model._keys_to_ignore_on_save or ()
    shapes = {
        name: torch.empty(tensor.shape, dtype=_stored(tensor, dtype), device="meta")
        for name, tensor in state.items()
        if name not in ignored
    }
    found: dict[str, torch.Tensor] = remove_tied_weights_from_state_dict(shapes, model)
    return found


def _together(model: PreTrainedModel, names: Iterable[str]) -> list[list[str]]:
    """The names in groups of those whose tensors make up one in a file, or several; most are alone."""
    conversions = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model, add_legacy=False)
    back = [entry.reverse_transform() for entry in reversed(conversions) if isinstance(entry, WeightConverter)]
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[apply_converters(name, back)[0]].append(name)
    return list(groups.values())


class _Files:
    """The files of a model, all as long as they will be, that take their tensors in any order."""

    def __init__(self, model: PreTrainedModel, folder: Path, tensors: dict[str, torch.Tensor], largest: str) -> None:
        self._places: dict[str, tuple[Path, int]] = {}
        require_room(folder, sum(map(size_of, tensors.values())))
        split = split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
            # The library keeps together what shares memory, as do experts that are one tensor in the model.
            get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
            filename_pattern=SAFETENSORS_WEIGHTS_FILE_PATTERN,
            max_shard_size=largest,
        )
        for file, names in split.filename_to_tensors.items():
            self._begin(folder / file, {name: tensors[name] for name in names})
        if split.is_sharded:
            index = {
                "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
                "weight_map": split.tensor_to_filename,
            }
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")

    def _begin(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        header, offsets = lay_out(tensors, {"format": "pt"})
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(map(size_of, tensors.values())))
        self._places |= {name: (path, offset) for name, offset in offsets.items()}

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor into its place."""
        path, offset = self._places[name]
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
