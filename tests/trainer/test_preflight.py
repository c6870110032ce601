"""A job is looked at before it takes GPUs: what is found, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.contract import TerminationMessage
from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob
from finetune_trainer.errors import UnavailableError
from finetune_trainer.preflight import sample as sampling
from finetune_trainer.preflight.__main__ import main
from finetune_trainer.preflight.network import check_names
from tests.support.jobs import a_job, write_rows


class Checked:
    """Checks jobs as a pod does."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self._monkeypatch = root, monkeypatch

    def __call__(self, job: FineTuneJob, **environment: str) -> TerminationMessage:
        (self.root / "job.json").write_text(json.dumps(job.to_wire()))
        environment |= {
            "FINETUNE_JOB_FILE": str(self.root / "job.json"),
            "FINETUNE_SCRATCH_DIR": str(self.root / "scratch"),
            "FINETUNE_TERMINATION_LOG": str(self.root / "word"),
        }
        for name, value in environment.items():
            self._monkeypatch.setenv(name, value)
        code = main()
        word = TerminationMessage.model_validate_json((self.root / "word").read_text())
        assert word.exit_code == code
        return word


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checked:
    return Checked(tmp_path, monkeypatch)


def test_what_is_well_is_told_in_a_sentence(tmp_path: Path, check: Checked, capsys: pytest.CaptureFixture[str]) -> None:
    word = check(a_job(tmp_path))
    assert word.exit_code == 0
    assert word.message.startswith(
        "the model (llama, 0.0 GiB) is there; the output can be written; the data has 19 rows"
    )
    assert "tokens are learned; 32.8K of 142K parameters learn (0.231 of them); DDP on 1 process needs" in word.message
    assert word.warnings == []
    assert "with [[ ]] around what is learned:\n<|im_start|>user" in capsys.readouterr().out
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("task", ["CausalLM", "SequenceClassification", "Regression"])
def test_every_task_is_checked(tmp_path: Path, check: Checked, task: str) -> None:
    word = check(a_job(tmp_path, "Full", task))
    assert (word.exit_code, "parameters learn" in word.message) == (0, True)


def test_a_model_that_is_not_there_is_the_specs_fault(tmp_path: Path, check: Checked) -> None:
    word = check(a_job(tmp_path, model={"uri": f"file://{tmp_path}/nowhere"}))
    assert (word.exit_code, word.cause.value) == (64, "Usage")
    assert word.message.startswith("spec.model.uri")


def test_rows_that_cannot_be_used_are_the_datas_fault(tmp_path: Path, check: Checked) -> None:
    job = a_job(tmp_path)
    write_rows(tmp_path / "data/Instruction.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    word = check(job)
    assert (word.exit_code, word.cause.value) == (65, "Data")
    assert f"{tmp_path}/data/Instruction.jsonl:2" in word.message
    assert word.advice == "repair or remove these rows, or set dataset.onInvalidRow to Drop"


def test_data_that_is_not_there_is_named(tmp_path: Path, check: Checked) -> None:
    word = check(a_job(tmp_path, dataset={"uri": f"file://{tmp_path}/none.jsonl"}))
    assert (word.exit_code, word.message.startswith("spec.dataset.uri: ")) == (65, True)


def test_an_output_that_cannot_be_written_is_told(tmp_path: Path, check: Checked) -> None:
    (tmp_path / "file").write_text("in the way")
    word = check(a_job(tmp_path, output={"uri": f"file://{tmp_path}/file/out"}))
    assert word.exit_code == 64
    assert word.message.startswith(f"spec.output.uri: file://{tmp_path}/file/out cannot be written")


def test_an_option_that_the_architecture_does_not_have_is_refused(tmp_path: Path, check: Checked) -> None:
    word = check(a_job(tmp_path, "Partial", select={"layers": {"indices": [7]}}))
    assert (word.exit_code, "there is no block 7" in word.message) == (64, True)


def large(job: FineTuneJob, **resources: Any) -> FineTuneJob:
    """The same job on other resources."""
    wire = job.to_wire()
    del wire["spec"]["resources"]["processesPerNode"]
    wire["spec"]["resources"] |= resources
    return resolve(FineTuneJob.from_wire(wire))


def test_more_processes_than_rows_are_refused(tmp_path: Path, check: Checked) -> None:
    word = check(large(a_job(tmp_path), nodes=3, gpusPerNode=8), PET_MASTER_ADDR="127.0.0.1", PET_NODE_RANK="0")
    assert word.exit_code == 64
    assert word.message == "spec.resources: 24 processes share 19 rows for training, and each needs one"


def test_a_step_larger_than_the_dataset_is_warned_of(tmp_path: Path, check: Checked) -> None:
    word = check(large(a_job(tmp_path), gpusPerNode=8))
    assert word.exit_code == 0
    assert word.warnings[0].startswith("a step takes 32 rows (of 8 processes")


def test_what_does_not_fit_is_warned_of_with_the_way_out(tmp_path: Path, check: Checked) -> None:
    job = a_job(tmp_path, "Full", hyperparameters={"perDeviceBatchSize": 16})
    product = "NVIDIA-A100-SXM4-80GB-MIG-1g.10gb"
    assert check(large(job, gpusPerNode=1, gpuProduct=product)).warnings == []
    wide = json.loads((tmp_path / "model/config.json").read_text()) | {"hidden_size": 8192, "intermediate_size": 16384}
    (tmp_path / "model/config.json").write_text(json.dumps(wide))
    word = check(large(job, gpusPerNode=1, gpuProduct=product))
    assert word.exit_code == 0
    (warning,) = word.warnings
    assert f"and {product} has 9.3 GiB: set hyperparameters.perDeviceBatchSize to 8 (now 16)" in warning
    assert "use strategy QLoRA" in warning


def test_what_fewer_pods_of_an_elastic_job_cannot_hold_is_warned_of(tmp_path: Path, check: Checked) -> None:
    job = a_job(tmp_path, "Full")
    product = "NVIDIA-A100-SXM4-80GB-MIG-1g.10gb"
    wide = json.loads((tmp_path / "model/config.json").read_text()) | {"hidden_size": 8192, "intermediate_size": 16384}
    (tmp_path / "model/config.json").write_text(json.dumps(wide))
    wire = large(job, nodes=8, gpusPerNode=1, gpuProduct=product).to_wire()
    wire["spec"]["distributed"] = {"sharding": "FSDP", "minNodes": 1}
    word = check(FineTuneJob.from_wire(wire), PET_MASTER_ADDR="127.0.0.1", PET_NODE_RANK="0")
    assert word.exit_code == 0, word
    warning = word.warnings[-1]
    assert warning.startswith("on distributed.minNodes 1 each of 1 processes needs an estimated")
    assert warning.endswith(f"which {product} has not: raise minNodes")


# --- samples of large datasets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".csv", ".parquet"])
def test_of_a_large_dataset_some_rows_are_read_as_they_stand(
    tmp_path: Path, check: Checked, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(sampling, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(sampling, "ROWS", 20)
    for number in range(6):
        write_in(
            tmp_path / f"many/{number}{ending}", [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(90)]
        )
    word = check(a_job(tmp_path, dataset={"uri": f"file://{tmp_path}/many/*{ending}"}))
    assert word.exit_code == 0, word.message
    assert "the data has 64 rows of a sample for training" in word.message


def test_a_bad_row_of_a_sample_keeps_its_place(tmp_path: Path, check: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "WHOLE_BYTES", 1000)
    rows: list[dict[str, Any]] = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(90)]
    rows[7] = {"prompt": "alone"}
    write_rows(tmp_path / "many/a.jsonl", rows)
    job = a_job(tmp_path, dataset={"uri": f"file://{tmp_path}/many/"})
    assert "a.jsonl:8" in check(job).message
    dropped = check(a_job(tmp_path, dataset={"uri": f"file://{tmp_path}/many/", "onInvalidRow": "Drop"}))
    assert dropped.exit_code == 0
    assert "1 of 25 rows were dropped" in dropped.warnings[0]


def write_in(path: Path, rows: list[dict[str, str]]) -> None:
    """Rows in the format of the name's ending."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    path.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    match "".join(path.suffixes):
        case ".json":
            path.write_bytes(json.dumps(rows).encode())
        case ".csv":
            pyarrow.csv.write_csv(pa.Table.from_pylist(rows), path)
        case ".parquet":
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
        case ".jsonl":
            path.write_bytes(lines)
        case suffixes:
            codec = "gzip" if suffixes.endswith(".gz") else "zstd"
            with pa.CompressedOutputStream(str(path), codec) as stream:
                stream.write(lines)


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_cluster_without_names_is_told_before_any_pod_waits_for_another() -> None:
    assert check_names("127.3.4.5") == "addresses are known"
    with pytest.raises(UnavailableError) as raised:
        check_names("tune-0.tune.ml.svc.no-such-cluster.invalid")
    assert "does not know kubernetes.default.svc.no-such-cluster.invalid" in raised.value.message
    assert "install cluster DNS" in raised.value.advice
