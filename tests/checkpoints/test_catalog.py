"""What counts as a checkpoint, which one is taken, and what is kept; on folders: the store hides the difference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.checkpoints import Checkpoints, Manifest, catalog
from finetune_trainer.checkpoints.manifest import step_uri
from finetune_trainer.checkpoints.uploader import Submission, commit
from finetune_trainer.errors import TrainerError, UsageError
from finetune_trainer.storage import Store

IDENTITY = Manifest(step=0, job="ml/llama", uid="u1", attempt=1, world_size=1, base_digest="b1")


@pytest.fixture
def store():
    with Store.connect({}) as store:
        yield store


@pytest.fixture
def root(tmp_path: Path) -> str:
    (tmp_path / "bucket").mkdir()
    return f"file://{tmp_path}/bucket/out/checkpoints"


def save(store: Store, root: str, tmp_path: Path, step: int, keep: int = 100, **identity: object) -> Path:
    """Commit a step of two files; the folder in the bucket."""
    folder = tmp_path / f"local-{step}"
    folder.mkdir()
    (folder / "weights").write_bytes(b"w" * 1000 + str(step).encode())
    (folder / "optimizer.pt").write_bytes(b"o" * 2000)
    manifest = IDENTITY.model_copy(update={"step": step, **identity})
    commit(store, Submission(folder=str(folder), root=root, keep=keep, manifest=manifest))
    assert not folder.exists()
    return Path(step_uri(root, step).removeprefix("file://"))


def steps(store: Store, root: str) -> list[int]:
    return [manifest.step for manifest in catalog.complete(store, root)]


def restored(store: Store, root: str, tmp_path: Path, **identity: object) -> tuple[int | None, list[str]]:
    warnings: list[str] = []
    ours = IDENTITY.model_copy(update=identity)
    checkpoints = Checkpoints(store, root, ours, keep=lambda: 3, on_commit=lambda ref: None)
    found = checkpoints.restore(tmp_path / "restored", warnings.append)
    return (found[0].step if found else None), warnings


def test_the_newest_complete_step_is_restored_with_its_files(store, root, tmp_path):
    for step in (10, 20):
        save(store, root, tmp_path, step)
    assert restored(store, root, tmp_path) == (20, [])
    (newest, *_) = catalog.complete(store, root)
    assert (catalog.fetch(store, root, newest, tmp_path / "again") / "weights").read_bytes().endswith(b"20")


def test_nothing_is_restored_from_an_empty_output(store, root, tmp_path):
    assert restored(store, root, tmp_path) == (None, [])


def test_a_step_without_a_manifest_does_not_exist(store, root, tmp_path):
    save(store, root, tmp_path, 10)
    (save(store, root, tmp_path, 20) / "manifest.json").unlink()
    assert restored(store, root, tmp_path) == (10, [])


@pytest.mark.parametrize("content", [b"", b'{"step": 20, "job"', b"[]", b"{}"])
def test_a_half_written_manifest_is_none(store, root, tmp_path, content):
    save(store, root, tmp_path, 10)
    (save(store, root, tmp_path, 20) / "manifest.json").write_bytes(content)
    assert restored(store, root, tmp_path) == (10, [])


def test_one_flipped_byte_is_named_and_the_step_before_is_taken(store, root, tmp_path):
    save(store, root, tmp_path, 10)
    weights = save(store, root, tmp_path, 20) / "weights"
    data = bytearray(weights.read_bytes())
    data[500] ^= 1
    weights.write_bytes(data)
    step, warnings = restored(store, root, tmp_path)
    assert step == 10
    assert "step 20 is corrupt" in warnings[0]
    assert "step-00000020/weights" in warnings[0]


def test_a_missing_file_is_named_and_the_step_before_is_taken(store, root, tmp_path):
    save(store, root, tmp_path, 10)
    (save(store, root, tmp_path, 20) / "optimizer.pt").unlink()
    step, warnings = restored(store, root, tmp_path)
    assert step == 10
    assert "optimizer.pt is named by its manifest but is not there" in warnings[0]


def test_another_jobs_checkpoints_are_neither_used_nor_overwritten(store, root, tmp_path):
    save(store, root, tmp_path, 10)
    with pytest.raises(
        UsageError, match=r"spec\.output\.uri: .* holds checkpoints of another job \(ml/llama, uid u1\)"
    ):
        restored(store, root, tmp_path, uid="u2")


def test_a_changed_base_model_is_refused(store, root, tmp_path):
    save(store, root, tmp_path, 10)
    with pytest.raises(UsageError, match=r"spec\.model\.uri: the model is not the one that step 10"):
        restored(store, root, tmp_path, base_digest="b2")


def test_a_writer_of_an_older_attempt_is_fenced_off(store, root, tmp_path):
    save(store, root, tmp_path, 10, attempt=2)
    with pytest.raises(TrainerError, match="attempt 2 of this job already writes"):
        save(store, root, tmp_path, 20, attempt=1)
    assert steps(store, root) == [10]


def test_a_later_attempt_replaces_a_step_whole(store, root, tmp_path):
    folder = save(store, root, tmp_path, 10)
    (folder / "only-in-attempt-1").write_bytes(b"x")
    save(store, root, tmp_path, 10, attempt=2)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "optimizer.pt", "weights"]
    assert json.loads((folder / "manifest.json").read_bytes())["attempt"] == 2


def test_the_newest_are_kept_and_what_is_incomplete_before_them_goes(store, root, tmp_path):
    (save(store, root, tmp_path, 5) / "manifest.json").unlink()
    for step in (10, 20, 30):
        save(store, root, tmp_path, step, keep=2)
    assert steps(store, root) == [30, 20]
    kept = {path.name for path in Path(root.removeprefix("file://")).iterdir() if any(path.iterdir())}
    assert kept == {"step-00000020", "step-00000030"}


def test_the_best_one_is_kept_beside_the_newest_until_a_better_one_is_complete(store, root, tmp_path):
    save(store, root, tmp_path, 10, keep=1, best=10)
    for step in (20, 30):
        save(store, root, tmp_path, step, keep=1, best=10)
    assert steps(store, root) == [30, 10]
    better = Submission(
        folder=str(tmp_path / "gone"), root=root, keep=1, manifest=IDENTITY.model_copy(update={"step": 40, "best": 40})
    )
    with pytest.raises(FileNotFoundError):
        commit(store, better)
    assert steps(store, root) == [30, 10]
    save(store, root, tmp_path, 50, keep=1, best=50)
    assert steps(store, root) == [50]


def test_one_file_of_one_step_is_fetched_by_their_names(store, root, tmp_path):
    for step in (10, 20):
        save(store, root, tmp_path, step)
    checkpoints = Checkpoints(store, root, IDENTITY, keep=lambda: 3, on_commit=lambda ref: None)
    assert checkpoints.fetch(10, "weights", tmp_path / "best").read_bytes().endswith(b"10")
    with pytest.raises(catalog.CorruptCheckpointError, match="no complete checkpoint of step 15"):
        checkpoints.fetch(15, "weights", tmp_path / "best")
    with pytest.raises(catalog.CorruptCheckpointError, match=r"step 10 has no scaler\.pt"):
        checkpoints.fetch(10, "scaler.pt", tmp_path / "best")


@given(steps=st.sets(st.integers(0, 9), min_size=1), keep=st.integers(1, 4), best=st.integers(0, 9))
def test_retention_never_removes_the_best(steps, keep, best):
    gone = catalog.expired(steps, keep, best)
    assert best not in gone
    assert set(gone) | {best} == set(catalog.expired(steps, keep)) | {best}


@given(steps=st.sets(st.integers(0, 10**8 - 1), min_size=1), keep=st.integers(1, 100))
def test_retention_never_removes_the_newest(steps, keep):
    gone = catalog.expired(steps, keep)
    assert max(steps) not in gone
    assert len(steps) - len(gone) == min(len(steps), keep)
    assert not gone or max(gone) < min(set(steps) - set(gone))
