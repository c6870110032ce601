"""What a run tells of itself while it goes on."""

from __future__ import annotations

import json
import math
import os
import threading
import urllib.request

import pytest

from finetune_api.contract import PROGRESS_PORT, CheckpointRef, ExitCode, Progress, Stage
from finetune_trainer.progress import Reporter, Sample, describe, eta_seconds, read_progress, tokens_per_second
from finetune_trainer.progress_server import metrics_text, serve
from tests.launch.conftest import StartPod
from tests.support.gangs import fresh_address


def get(address: str, path: str, port: int = PROGRESS_PORT) -> str:
    with urllib.request.urlopen(f"http://{address}:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def test_a_running_pod_answers_with_its_progress(start_pod: StartPod, tmp_path) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    pod = start_pod("report_and_wait", TEST_FIFO=fifo)
    pod.line("reported")
    progress = Progress.from_wire(json.loads(get(pod.address, "/progress")))
    assert (progress.stage, progress.step, progress.total_steps, progress.loss) == (Stage.TRAINING, 2, 10, None)
    assert progress.metrics == {'eval"loss': 1.5}
    assert progress.eta_seconds is not None
    metrics = get(pod.address, "/metrics")
    assert 'finetune_evaluation{metric="eval\\"loss"} 1.5' in metrics
    assert "finetune_step 2" in metrics
    assert get(pod.address, "/healthz") == "ok\n"
    fifo.write_text("go")
    assert pod.exit_code() == ExitCode.OK


def test_the_log_tells_stages_and_steps_in_words(start_pod: StartPod, tmp_path) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    pod = start_pod("report_and_wait", TEST_FIFO=fifo)
    assert pod.line("Training").endswith("Training: epoch 1")
    assert pod.line("loss").endswith("step 1/10  loss 2.5  lr 2.0e-04")


def test_the_pace_counts_only_the_steps_of_this_attempt() -> None:
    resumed = [Sample(100.0, 900), Sample(110.0, 905)]
    assert eta_seconds(resumed, 1000) == 190


@pytest.mark.parametrize(
    ("history", "total"),
    [([], 10), ([Sample(0, 1)], 10), ([Sample(0, 1), Sample(5, 1)], 10), ([Sample(0, 1), Sample(5, 2)], None)],
)
def test_there_is_no_eta_without_a_pace_and_an_end(history: list[Sample], total: int | None) -> None:
    assert eta_seconds(history, total) is None


def test_tokens_a_second_need_two_counts() -> None:
    assert tokens_per_second([Sample(0, 1, 100), Sample(2, 2, 300)]) == 100
    assert tokens_per_second([Sample(0, 1), Sample(2, 2, 300)]) is None


def test_a_step_back_starts_the_pace_anew() -> None:
    reporter = Reporter()
    reporter.update(step=50, total_steps=60)
    reporter.update(step=51)
    reporter.update(step=10)
    assert len(reporter._history) == 1


def test_numbers_of_torch_and_numpy_become_plain_ones() -> None:
    import numpy as np
    import torch

    reporter = Reporter()
    reporter.update(loss=torch.tensor(1.5), grad_norm=np.float32(0.25), learning_rate=np.float64(1e-4), step=3)
    reporter.update(metrics={"eval_loss": np.float32(2.0), "broken": math.inf})
    answer = json.loads(json.dumps(reporter.snapshot().to_wire(), allow_nan=False))
    assert (answer["loss"], answer["gradNorm"], answer["metrics"]) == (1.5, 0.25, {"eval_loss": 2.0})


def test_a_field_that_progress_does_not_have_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="Progress has no field los"):
        Reporter().update(los=1.0)


def test_warnings_are_told_once_and_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    for number in [1, 1, *range(30)]:
        reporter.warn(f"row {number}")
    assert reporter.snapshot().warnings == [f"row {number}" for number in range(14, 30)]
    assert capsys.readouterr().err.count("row 1\n") == 1


def test_the_agent_finds_a_warning_that_came_just_before_the_end(tmp_path) -> None:
    file = tmp_path / "progress.json"
    reporter = Reporter(file=file)
    reporter.update(step=8)
    reporter.warn("losses part")
    left = read_progress(file)
    assert left is not None
    assert left.warnings == ["losses part"]


def test_the_agent_finds_the_state_of_a_worker_that_was_killed(tmp_path) -> None:
    file = tmp_path / "progress.json"
    reporter = Reporter(attempt=2, file=file)
    reporter.update(step=8)
    reporter.update(step=9, checkpoint=CheckpointRef(uri="s3://b/step-00000009", step=9, time="now"))
    left = read_progress(file)
    assert left is not None
    assert (left.attempt, left.step) == (2, 9)


def test_a_busy_port_warns_and_lets_the_training_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    address, reporter = fresh_address(), Reporter()
    server = serve(reporter, address, 0)
    assert server is not None
    assert serve(reporter, address, server.server_port) is None
    assert "training goes on without it" in reporter.snapshot().warnings[0]
    assert json.loads(get(address, "/progress", server.server_port))["step"] == 0
    server.shutdown()
    server.server_close()


def test_prometheus_sees_one_header_a_metric() -> None:
    text = metrics_text(Progress(step=3, metrics={"eval_loss": 1.0, "eval_perplexity": 2.7}))
    assert text.count("# TYPE finetune_evaluation gauge") == 1
    assert 'finetune_stage{stage="Starting"} 1' in text


def test_an_upload_in_a_side_thread_is_no_sign_of_life_of_the_training() -> None:
    reporter = Reporter()
    reporter._beaten -= 100
    side = threading.Thread(target=reporter.update, kwargs={"checkpoint": None})
    side.start()
    side.join()
    assert reporter.snapshot().heartbeat_age_seconds >= 100
    reporter.update(step=1)
    assert reporter.snapshot().heartbeat_age_seconds < 1


def test_a_line_for_people_holds_what_is_known() -> None:
    progress = Progress(
        step=120, total_steps=1000, loss=1.8333, learning_rate=2e-4, tokens_per_second=5210.4, eta_seconds=750
    )
    assert describe(progress) == "step 120/1000  loss 1.833  lr 2.0e-04  5,210 tok/s  ETA 0:12:30"
