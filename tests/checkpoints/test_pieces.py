"""Tensors in parts: staged as files that others can read, and put together again in any other division."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file

from finetune_trainer.checkpoints.pieces import IncompleteError, Piece, Saved
from finetune_trainer.checkpoints.staging import MemoryFile, Staging, require_memory
from finetune_trainer.errors import OutOfMemoryError
from finetune_trainer.layout import TYPES
from finetune_trainer.memory import available_bytes


def content(file: MemoryFile) -> bytes:
    return Path(f"/proc/self/fd/{file.fd}").read_bytes()


def whole(tensor: torch.Tensor) -> Piece:
    return Piece(tensor, (0,) * tensor.dim(), tuple(tensor.shape))


def rows(tensor: torch.Tensor, rank: int, ranks: int) -> Piece | None:
    """What a rank holds of a tensor that is divided by its rows, as FSDP divides; None where nothing is left for it."""
    size = math.ceil(tensor.shape[0] / ranks)
    part = tensor[rank * size : (rank + 1) * size]
    return Piece(part, (rank * size, *(0,) * (tensor.dim() - 1)), tuple(tensor.shape)) if len(part) else None


def saved_by(folder: Path, tensors: dict[str, torch.Tensor], ranks: int) -> list[Path]:
    """The files of so many ranks that each save their rows."""
    paths = []
    for rank in range(ranks):
        pieces = {name: piece for name, tensor in tensors.items() if (piece := rows(tensor, rank, ranks))}
        file = MemoryFile("test")
        file.write(pieces)
        path = folder / f"w-{rank:05d}-of-{ranks:05d}.safetensors"
        path.write_bytes(content(file))
        file.close()
        paths.append(path)
    return paths


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_is_staged_is_a_safetensors_file_of_every_type(dtype):
    numbers = torch.arange(6).reshape(2, 3)
    tensors = {"b": numbers.to(dtype), "a.scalar": torch.tensor(3.5), "c": torch.ones(3, dtype=torch.uint8)}
    file = MemoryFile("test")
    file.write({name: whole(tensor) for name, tensor in tensors.items()})
    found = load(content(file))
    file.close()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())


def test_the_memory_is_used_again_and_grows_and_shrinks_with_what_is_staged():
    file = MemoryFile("test")
    for size in (1000, 1000, 3000, 10):
        tensor = torch.randn(size)
        file.write({"x": whole(tensor)})
        assert torch.equal(load(content(file))["x"], tensor)
        assert file.size < size * 4 + 200
    file.close()


def test_what_is_not_contiguous_is_staged_as_it_reads():
    tensor = torch.arange(12.0).reshape(3, 4).t()
    file = MemoryFile("test")
    file.write({"x": whole(tensor)})
    assert torch.equal(load(content(file))["x"], tensor)
    file.close()


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 9), before=st.integers(1, 5), after=st.integers(1, 5))
def test_parts_are_put_together_in_any_other_division(tmp_path_factory, count, before, after):
    tensor = torch.randn(count, 3)
    saved = Saved(saved_by(tmp_path_factory.mktemp("parts"), {"x": tensor}, before))
    assert saved.shapes == {"x": (count, 3)}
    for rank in range(after):
        piece = rows(tensor, rank, after)
        if piece is not None:
            found = saved.read("x", piece.offset, tuple(piece.values.shape))
            assert torch.equal(found, piece.values)


def test_parts_along_several_dimensions_are_put_together_too(tmp_path):
    tensor = torch.arange(24.0).reshape(4, 6)
    paths = []
    for number, (row, column) in enumerate([(0, 0), (0, 3), (2, 0), (2, 3)]):
        file = MemoryFile("test")
        file.write({"x": Piece(tensor[row : row + 2, column : column + 3], (row, column), (4, 6))})
        paths.append(tmp_path / f"{number}.safetensors")
        paths[-1].write_bytes(content(file))
        file.close()
    assert torch.equal(Saved(paths).read("x", (0, 0), (4, 6)), tensor)
    assert torch.equal(Saved(paths).read("x", (1, 2), (2, 3)), tensor[1:3, 2:5])


def test_a_missing_part_is_told_and_not_filled(tmp_path):
    first, *_ = saved_by(tmp_path, {"x": torch.randn(6, 2)}, 3)
    saved = Saved([first])
    assert saved.read("x", (0, 0), (2, 2)).shape == (2, 2)
    with pytest.raises(IncompleteError, match="x"):
        saved.read("x", (0, 0), (3, 2))


def test_torchs_own_reader_of_sharded_checkpoints_reads_ours(tmp_path):
    tensors = {"model.weight": torch.randn(5, 3), "model.bias": torch.randn(5)}
    saved_by(tmp_path, tensors, 2)
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_only_the_first_rank_saves_what_all_have_whole():
    state = {"weights": {"x": torch.ones(3)}, "nothing": {}}
    first, second = Staging(0, 2, 2), Staging(1, 2, 2)
    (held,) = first.stage(state)
    assert (held.name, held.rank) == ("weights.safetensors", None)
    assert torch.equal(load_file(held.path)["x"], torch.ones(3))
    assert second.stage(state) == []
    assert second.descriptors == []
    first.close()


def test_a_state_that_does_not_fit_into_memory_is_refused_with_what_to_ask_for():
    with pytest.raises(OutOfMemoryError, match=r"1048576\.0 GiB are needed") as caught:
        require_memory(2**49, 0, ranks=2)
    assert "raise resources.memory by" in caught.value.advice
    require_memory(2**49, 2**49, ranks=2)


def group(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_free_memory_is_the_least_of_what_the_container_and_the_machine_have(tmp_path):
    meminfo, nothing = group(tmp_path, meminfo="MemTotal: 9 kB\nMemAvailable: 3 kB\n") / "meminfo", tmp_path / "none"
    stat = "anon 5\ninactive_file 100\n"
    new = group(tmp_path / "v2", memory__max="1000", memory__current="600", memory__stat=stat)
    assert available_bytes(new, nothing, meminfo) == 500
    group(new, memory__max="max")
    assert available_bytes(new, nothing, meminfo) == 3 * 1024
    old = {"memory__limit_in_bytes": "900", "memory__usage_in_bytes": "800", "memory__stat": "total_inactive_file 50"}
    group(tmp_path / "v1/memory", **old)
    assert available_bytes(tmp_path / "v1", nothing, meminfo) == 150
    assert available_bytes(nothing, nothing, nothing) is None
