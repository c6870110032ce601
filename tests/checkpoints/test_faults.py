"""What storage, disks and clocks do to a run, each really done: it ends with the weights of the undisturbed one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.checkpoints.interrupted import STEPS, CheckpointingTrainer, run
from tests.support.disks import small_file_system
from tests.support.s3 import Proxy, S3Server
from transformers import TrainerCallback

from finetune_trainer.checkpoints import catalog
from finetune_trainer.checkpoints.trainer import SMALL_BYTES
from finetune_trainer.errors import UnavailableError
from finetune_trainer.storage import DiskFullError, Store


class At(TrainerCallback):
    """Does something once, when a step is done; before that step is saved."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self._step, self._act = step, act

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self._step:
            self._act()


class KilledError(Exception):
    """Stands for what ends a process between two steps."""


def die() -> None:
    raise KilledError


def at(step: int, act: Callable[[], object]) -> Callable[[CheckpointingTrainer], None]:
    return lambda trainer: trainer.add_callback(At(step, act))


def saving_every_step(*more: Callable[[CheckpointingTrainer], None]) -> Callable[[CheckpointingTrainer], None]:
    def arm(trainer: CheckpointingTrainer) -> None:
        trainer.args.save_steps = 1
        for other in more:
            other(trainer)

    return arm


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> str:
    """The digest of the weights."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(f"file://{folder}/checkpoints", folder / "scratch", 1)[1]


@pytest.fixture
def root(tmp_path: Path) -> str:
    return f"file://{tmp_path}/checkpoints"


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The only way to the server, also for the processes that upload."""
    with Proxy(s3_server.endpoint) as proxy:
        for name, value in s3_server.environ(proxy.url).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "small", 1) as folder:
        yield folder


def steps(root: str) -> list[int]:
    with Store.connect({}) as store:
        return [manifest.step for manifest in catalog.complete(store, root)]


def folder_of(root: str, step: int) -> Path:
    return Path(root.removeprefix("file://")) / f"step-{step:08d}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_bucket_that_fails_a_twentieth_of_all_requests_and_is_then_away(tmp_path, undisturbed, proxy, bucket, seed):
    root = f"s3://{bucket}/out/checkpoints"
    proxy.fail(0.05, seed)
    with pytest.raises(KilledError):
        run(root, tmp_path, 1, saving_every_step(at(4, lambda: proxy.down_for(2.0)), at(8, die)))
    resumed_from, digest = run(root, tmp_path, 2, saving_every_step())
    assert proxy.failed > 0
    # The upload of step 7 may have been on its way when the process died.
    assert resumed_from in (6, 7)
    assert digest == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_bucket_that_is_away_for_a_minute_is_waited_for_when_the_next_checkpoint_is_due(
    tmp_path, undisturbed, proxy, bucket
):
    # A checkpoint every three steps. The one of step 6 finds nobody; steps 7 to 9 are trained meanwhile.
    away, moments = 60.0, dict.fromkeys((5, 9, 10), 0.0)

    def note(step: int) -> None:
        moments[step] = time.monotonic()

    def arm(trainer: CheckpointingTrainer) -> None:
        def leave() -> None:
            trainer.checkpoints.wait()
            proxy.down_for(away)
            note(5)

        for step, act in ((5, leave), (9, lambda: note(9)), (10, lambda: note(10))):
            at(step, act)(trainer)

    root = f"s3://{bucket}/out/checkpoints"
    proxy.fail(0.05, seed=5)
    assert run(root, tmp_path, 1, arm) == (0, undisturbed)
    assert moments[9] - moments[5] < away / 2
    assert moments[10] - moments[5] > away
    assert proxy.failed > 0
    assert run(root, tmp_path, 2) == (STEPS, undisturbed)


@pytest.mark.slow
def test_an_upload_that_is_slower_than_training_is_waited_for(tmp_path, undisturbed, proxy, bucket, monkeypatch):
    waits: list[tuple[float, bool]] = []
    kept: list[CheckpointingTrainer] = []

    def arm(trainer: CheckpointingTrainer) -> None:
        monkeypatch.setattr(trainer.checkpoints, "_on_wait", lambda *wait: waits.append(wait))
        kept.append(trainer)
        proxy.slow(60_000)

    root = f"s3://{bucket}/out/checkpoints"
    assert run(root, tmp_path, 1, arm) == (0, undisturbed)
    assert waits[0][0] == pytest.approx(1.0, abs=0.9)
    assert any(moved for _, moved in waits)
    assert kept[0].checkpoints.waited_seconds > 1.0
    proxy.slow(1e9)
    assert run(root, tmp_path, 2) == (STEPS, undisturbed)


def test_a_manifest_that_is_half_written_counts_as_none(tmp_path, undisturbed, root):
    with pytest.raises(KilledError):
        run(root, tmp_path / "scratch", 1, at(8, die))
    path = folder_of(root, 6) / "manifest.json"
    path.write_bytes(path.read_bytes()[:200])
    assert run(root, tmp_path / "scratch", 2) == (3, undisturbed)


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "rng.safetensors"])
def test_a_flipped_byte_is_named_and_the_checkpoint_before_is_taken(tmp_path, undisturbed, root, name, capfd):
    with pytest.raises(KilledError):
        run(root, tmp_path / "scratch", 1, at(8, die))
    path = folder_of(root, 6) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert run(root, tmp_path / "scratch", 2) == (3, undisturbed)
    said = capfd.readouterr().err
    assert f"checkpoint of step 6 is corrupt and passed over: {root}/step-00000006/{name} has checksum" in said


def test_a_volume_that_is_full_ends_the_run_with_its_name_and_keeps_the_checkpoint_before(
    tmp_path, undisturbed, small_disk
):
    root, hog = f"file://{small_disk}/checkpoints", small_disk / "hog"

    def fill_beside(trainer: CheckpointingTrainer) -> None:
        trainer.checkpoints.wait()
        with hog.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    with pytest.raises(UnavailableError, match=r"checkpoint of step 6: .*small.* is full") as caught:
        run(root, tmp_path / "scratch", 1, lambda trainer: at(5, lambda: fill_beside(trainer))(trainer))
    assert caught.value.exit_code == 69
    assert "spec.output.uri more room" in caught.value.advice
    assert steps(root) == [3]
    assert not folder_of(root, 6).exists()
    hog.unlink()
    assert run(root, tmp_path / "scratch", 2) == (3, undisturbed)


def test_a_scratch_folder_without_room_is_told_before_anything_is_saved(tmp_path, undisturbed, root, small_disk):
    with pytest.raises(DiskFullError, match=f"bytes free, {SMALL_BYTES:,} bytes are needed there") as caught:
        run(root, small_disk / "scratch", 1)
    assert str(small_disk) in caught.value.message
    assert steps(root) == []
    assert run(root, tmp_path / "scratch", 2) == (0, undisturbed)


@pytest.mark.parametrize("jump", [-400 * 86400.0, 400 * 86400.0])
def test_a_clock_that_jumps_changes_nothing(tmp_path, undisturbed, root, monkeypatch, jump):
    now = time.time
    with pytest.raises(KilledError):
        run(
            root,
            tmp_path / "scratch",
            1,
            lambda trainer: (
                at(4, lambda: monkeypatch.setattr(time, "time", lambda: now() + jump))(trainer),
                at(8, die)(trainer),
            ),
        )
    # The newest is the one of the highest step, however old it says it is.
    path = folder_of(root, 6) / "manifest.json"
    path.write_text(path.read_text().replace('"created": "2', '"created": "1'))
    assert run(root, tmp_path / "scratch", 2) == (6, undisturbed)
