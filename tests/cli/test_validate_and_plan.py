"""`finetune validate` and `finetune plan` as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.support.s3 import S3Server
from tests.support.shell import Shell

JOB = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata:
  name: tune
spec:
  task: {type: Instruction}
  model: {uri: s3://models/tiny}
  dataset: {uri: s3://data/train.jsonl}
  strategy: {type: LoRA}
  hyperparameters:
    epochs: 2
    learningRate: 1e-4
  output: {uri: s3://out/tiny}
"""


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture
def refusal(shell: Shell) -> Callable[[str], list[str]]:
    """The lines with which a file is refused."""

    def validate(text: str) -> list[str]:
        shell.write("job.yaml", text)
        done = shell.run("validate", "job.yaml")
        assert (done.returncode, done.stdout) == (1, "")
        return done.stderr.splitlines()

    return validate


def test_a_valid_file_is_said_to_be_valid(shell: Shell) -> None:
    shell.write("job.yaml", JOB)
    done = shell.run("validate", "job.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (0, "job.yaml: valid\n", "")


def test_every_problem_of_every_document_is_told_with_its_line(refusal: Callable[[str], list[str]]) -> None:
    second = JOB.replace("epochs: 2", "epoch: 2").replace("{type: Instruction}", "{type: Nonsense}")
    found = refusal(JOB.replace("epochs: 2", "epochs: -1") + "---\n" + second)
    assert [line.partition(": ")[0] for line in found] == ["job.yaml:11", "job.yaml:20", "job.yaml:25"]
    assert "spec.hyperparameters.epochs" in found[0]
    assert "spec.task.type: Unsupported value" in found[1]
    assert "epoch" in found[2]
    assert "epochs" in found[2]


def test_options_of_another_strategy_are_refused_with_the_way_out(refusal: Callable[[str], list[str]]) -> None:
    (line,) = refusal(JOB.replace("{type: LoRA}", "{type: Full, lora: {rank: 8}}"))
    assert "strategy.lora belongs to the types LoRA and QLoRA; remove it or change strategy.type" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nb: 2\n", "job.yaml:2:2: not YAML: expected ',' or ']'"),
        ("", "job.yaml: no document in it"),
        ("# nothing\n---\n", "job.yaml: no document in it"),
        ("- a\n", "job.yaml:1: not an object but list"),
        (
            JOB.replace("FineTuneJob", "TrainJob"),
            "job.yaml:1: apiVersion finetune.dev/v1alpha1 and kind TrainJob are not",
        ),
        (JOB.replace("v1alpha1", "v9"), "job.yaml:1: apiVersion finetune.dev/v9"),
    ],
)
def test_what_is_no_job_is_refused_by_its_place(refusal: Callable[[str], list[str]], text: str, words: str) -> None:
    assert refusal(text)[0].startswith(words)


def test_a_missing_file_is_named(shell: Shell) -> None:
    done = shell.run("validate", "nowhere.yaml")
    assert (done.returncode, done.stderr) == (1, "nowhere.yaml: cannot be read: No such file or directory\n")


def test_what_kubectl_reads_as_a_number_or_a_text_is_one_here(shell: Shell) -> None:
    shell.write("job.yaml", JOB.replace("name: tune", "name: tune\n  labels: {since: 2026-01-01}"))
    assert shell.run("validate", "job.yaml").returncode == 0


def test_wrong_use_is_exit_code_2(shell: Shell) -> None:
    assert shell.run("validate").returncode == 2
    assert shell.run("run", "nowhere.yaml").returncode == 2
    assert shell.run("nonsense").returncode == 2


def test_run_refuses_what_validate_refuses(shell: Shell) -> None:
    shell.write("job.yaml", JOB.replace("epochs: 2", "epochs: -1"))
    done = shell.run("run", "job.yaml")
    assert done.returncode == 2
    assert done.stderr.removeprefix("finetune: ") == shell.run("validate", "job.yaml").stderr
    assert not (shell.folder / ".finetune").exists()


def test_run_wants_each_job_once(shell: Shell) -> None:
    shell.write("job.yaml", JOB + "---\n" + JOB)
    done = shell.run("run", "job.yaml")
    assert (done.returncode, done.stderr) == (
        2, "finetune: job.yaml:15: the job default/tune stands at job.yaml:1 already; give it another name\n"
    )  # fmt: skip


def test_a_plan_has_all_jobs_and_says_what_is_not_known_yet(shell: Shell) -> None:
    second = JOB.replace("name: tune", "name: second").replace("s3://models/tiny", "job://tune")
    shell.write("chain.yaml", JOB + "---\n" + second)
    done = shell.run("plan", "chain.yaml")
    assert done.returncode == 0, done.stderr
    objects = [(item["kind"], item["metadata"]["name"]) for item in yaml.safe_load_all(done.stdout)]
    assert objects == [
        ("ConfigMap", "tune-job"), ("Job", "tune"), ("ConfigMap", "second-job"), ("Job", "second"),
    ]  # fmt: skip
    assert "# spec.model.uri is what job tune delivers, and is filled in when that has succeeded\n" in done.stdout


def test_plan_shows_the_manifests_and_the_resolved_job(shell: Shell) -> None:
    shell.write("job.yaml", JOB)
    done = shell.run("plan", "job.yaml")
    assert done.returncode == 0, done.stderr
    documents = list(yaml.safe_load_all(done.stdout))
    assert [item["kind"] for item in documents] == ["ConfigMap", "Job"]
    resolved = json.loads(documents[0]["data"]["job.json"])
    assert resolved["spec"]["strategy"]["lora"]["rank"] == 16
    assert "  job.json: |\n" in done.stdout


def test_plan_begins_with_what_follows_from_the_strategy(shell: Shell) -> None:
    shell.write("job.yaml", JOB.replace("    learningRate: 1e-4\n", ""))
    comments = [line for line in shell.run("plan", "job.yaml").stdout.splitlines() if line.startswith("#")]
    assert comments[0] == "# default/tune: LoRA for Instruction"
    assert "# resolved: spec.hyperparameters.learningRate = 0.0002" in comments


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 8,
    "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def comments(shell: Shell, job: str) -> list[str]:
    shell.write("job.yaml", job)
    done = shell.run("plan", "job.yaml")
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("# ") for line in done.stdout.splitlines() if line.startswith("#")]


def test_plan_tells_how_many_rows_a_step_has_over_all_processes(shell: Shell) -> None:
    told = comments(shell, JOB + "  resources: {nodes: 2, processesPerNode: 3}\n")
    assert any(line.startswith("6 processes train together: 24 rows a step, a learning rate of ") for line in told)


def partial(shell: Shell, select: str) -> str:
    (shell.folder / "model").mkdir(exist_ok=True)
    shell.write("model/config.json", json.dumps(LLAMA))
    local = JOB.replace("s3://models/tiny", f"file://{shell.folder}/model")
    return local.replace("{type: LoRA}", f"{{type: Partial, select: {select}}}")


def test_plan_tells_what_will_train_from_the_configuration_alone(shell: Shell) -> None:
    found = comments(shell, partial(shell, "{layers: {last: 2}, modules: [Attention, LayerNorm]}"))
    told = found[next(i for i, line in enumerate(found) if line.startswith("will train")) :]
    assert told == [
        "will train 424 of 3,400 parameters (12.471%)",
        "  blocks 2-3: self_attn.q_proj (Attention, 128)",
        "  blocks 2-3: self_attn.k_proj (Attention, 64)",
        "  blocks 2-3: self_attn.v_proj (Attention, 64)",
        "  blocks 2-3: self_attn.o_proj (Attention, 128)",
        "  blocks 2-3: input_layernorm (LayerNorm, 16)",
        "  blocks 2-3: post_attention_layernorm (LayerNorm, 16)",
        "  model.norm (LayerNorm, 8)",
    ]


def test_plan_tells_what_the_architecture_does_not_have(shell: Shell) -> None:
    assert comments(shell, partial(shell, "{layers: {indices: [40]}}"))[-1] == (
        "what will train is not known: spec.strategy.select.layers.indices: there is no block 40; the model has blocks "
        "0 to 3; count from 0, at the input"
    )


def test_plan_reads_the_configuration_from_a_bucket(shell: Shell, s3_server: S3Server, bucket: str) -> None:
    shell.environ |= s3_server.environ()
    job = partial(shell, "{modules: [Head]}").replace(f"file://{shell.folder}/model", f"s3://{bucket}/tiny")
    missing = f"what will train is not known: there is no object s3://{bucket}/tiny/config.json"
    assert comments(shell, job)[-1].startswith(missing)
    shell.run("storage", "cp", "model", f"s3://{bucket}/tiny/")
    assert comments(shell, job)[-1] == "  lm_head (Head, 512)"


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        (
            "pvc://claim/model",
            "pvc://claim/model lies on a volume of the cluster, out of this command's reach; give --config",
        ),
        ("file:///nowhere", "there is no config.json in /nowhere"),
        ("s3://models/tiny", "neither the job nor the environment names an S3 endpoint, such as AWS_ENDPOINT_URL_S3"),
    ],
)
def test_plan_says_why_it_cannot_tell_what_will_train(shell: Shell, uri: str, why: str) -> None:
    assert comments(shell, JOB.replace("s3://models/tiny", uri))[-1] == f"what will train is not known: {why}"
