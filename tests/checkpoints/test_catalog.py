"""What counts as a checkpoint, which one is taken, and what is kept; on folders: the store hides the difference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.checkpoints import Checkpoints, Manifest, catalog
from finetune_trainer.checkpoints.manifest import step_uri
from finetune_trainer.checkpoints.uploader import Held, Phase, Request, begin, commit, upload
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
    (tmp_path / "weights").write_bytes(b"w" * 1000 + str(step).encode())
    (tmp_path / "optimizer.pt").write_bytes(b"o" * 2000)
    request = Request(
        phase=Phase.BEGIN,
        root=root,
        keep=keep,
        manifest=IDENTITY.model_copy(update={"step": step, **identity}),
        held=[Held(name=name, path=str(tmp_path / name)) for name in ("optimizer.pt", "weights")],
    )
    begin(store, request)
    files = upload(store, request, moved=lambda: None).files
    commit(store, request.model_copy(update={"manifest": request.manifest.model_copy(update={"files": files})}))
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
    folder = catalog.fetch(store, root, 20, newest.files, tmp_path / "again")
    assert (folder / "weights").read_bytes().endswith(b"20")


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
    better = Request(
        phase=Phase.BEGIN,
        root=root,
        keep=1,
        manifest=IDENTITY.model_copy(update={"step": 40, "best": 40}),
        held=[Held(name="weights", path=str(tmp_path / "gone"))],
    )
    begin(store, better)
    with pytest.raises(FileNotFoundError):
        upload(store, better, moved=lambda: None)
    assert steps(store, root) == [30, 10]
    save(store, root, tmp_path, 50, keep=1, best=50)
    assert steps(store, root) == [50]


def test_one_part_of_the_state_of_one_step_is_fetched_in_all_its_files(store, root, tmp_path):
    save(store, root, tmp_path, 10)
    (manifest,) = catalog.complete(store, root)
    names = ("w-00000-of-00002.safetensors", "w-00001-of-00002.safetensors", "o.safetensors", "w.pt")
    entries = [manifest.files[0].model_copy(update={"name": name}) for name in names]
    folder = Path(step_uri(root, 10).removeprefix("file://"))
    for name in names:
        shutil.copy(folder / manifest.files[0].name, folder / name)
    changed = manifest.model_copy(update={"files": entries})
    (folder / "manifest.json").write_text(changed.model_dump_json(by_alias=True))
    checkpoints = Checkpoints(store, root, IDENTITY, keep=lambda: 3, on_commit=lambda ref: None)
    assert [path.name for path in checkpoints.fetch(10, "w", tmp_path / "best")] == list(names[:2])
    with pytest.raises(catalog.CorruptCheckpointError, match="no complete checkpoint of step 15"):
        checkpoints.fetch(15, "w", tmp_path / "best")
    with pytest.raises(catalog.CorruptCheckpointError, match="step 10 has no scaler"):
        checkpoints.fetch(10, "scaler", tmp_path / "best")


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
