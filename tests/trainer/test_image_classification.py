"""Whole runs of small image models, from folders of images to a model that plain transformers loads."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, BertConfig, ResNetConfig, ViTConfig

from finetune_api.contract import Result
from finetune_api.job import Attention
from finetune_trainer.adapters import load_adapter
from finetune_trainer.errors import DataError, StoppedError, UsageError
from finetune_trainer.hardware import asked_attention
from tests.support.images import (
    COLORS,
    an_image_job,
    picture,
    save_timm,
    save_tiny_resnet,
    save_tiny_vit,
    write_folders,
)
from tests.support.jobs import a_context, a_session, run, write_rows
from tests.support.models import changed, state_of
from tests.trainer.test_resume import StopsAt

Save = Callable[[Path], Path]
MODELS: dict[str, Save] = {
    "ViT": save_tiny_vit,
    "ResNet": save_tiny_resnet,
    "timm's ViT": lambda folder: save_timm(folder, "test_vit", 64),
    "timm's ResNet": lambda folder: save_timm(folder, "test_resnet", 64),
    "timm's EfficientNet": lambda folder: save_timm(folder, "test_efficientnet", 64),
}
LAST_BLOCK = {"select": {"layers": {"last": 1}}}
LAST_STAGE = {"lora": {"targetModules": ["convolution"]}}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT, Full": ("ViT", "Full", {}),
    "ViT, LoRA": ("ViT", "LoRA", {}),
    "ViT, QLoRA": ("ViT", "QLoRA", {}),
    "ViT, Partial": ("ViT", "Partial", LAST_BLOCK),
    "ViT, LayerNorm": ("ViT", "LayerNorm", {}),
    "ViT, Green": ("ViT", "Green", {}),
    "ViT, Adapter": ("ViT", "Adapter", {}),
    "ViT, IA3": ("ViT", "IA3", {}),
    "ViT, Additive": ("ViT", "Additive", {}),
    "ResNet, Full": ("ResNet", "Full", {}),
    "ResNet, Partial": ("ResNet", "Partial", LAST_BLOCK),
    "ResNet, IA3 on convolutions": ("ResNet", "IA3", {"ia3": {"targetModules": ["convolution"]}}),
    "ResNet, LoRA on convolutions": ("ResNet", "LoRA", LAST_STAGE),
    "ResNet, Green": ("ResNet", "Green", {}),
    "timm's ViT, Full": ("timm's ViT", "Full", {}),
    "timm's ViT, QLoRA": ("timm's ViT", "QLoRA", {}),
    "timm's ResNet, Full": ("timm's ResNet", "Full", {}),
    "timm's ResNet, Partial": ("timm's ResNet", "Partial", LAST_BLOCK),
    "timm's EfficientNet, LoRA": ("timm's EfficientNet", "LoRA", {"lora": {"targetModules": ["conv_pw", "conv_pwl"]}}),
}


@dataclass
class Outcome:
    root: Path
    result: Result

    @property
    def delivered(self) -> Path:
        return self.root / "out" / self.result.output.kind

    def loaded(self) -> torch.nn.Module:
        """What is delivered, as somebody loads it who has nothing of ours."""
        if self.result.output.kind == "model":
            return AutoModelForImageClassification.from_pretrained(self.delivered).eval()
        base = AutoModelForImageClassification.from_pretrained(
            self.root / "model", num_labels=3, ignore_mismatched_sizes=True
        )
        if "peft_type" not in json.loads((self.delivered / "adapter_config.json").read_text()):
            return load_adapter(base, self.delivered).eval()
        return PeftModel.from_pretrained(base, str(self.delivered)).eval()


@pytest.fixture(scope="module")
def outcome(request, tmp_path_factory, cache={}) -> Outcome:  # noqa: B006
    name = request.param
    if name not in cache:
        model, strategy, options = CASES[name]
        root = tmp_path_factory.mktemp("run")
        MODELS[model](root / "model")
        job = an_image_job(root, strategy, checkpoint={"everySteps": 8}, **options)
        cache[name] = Outcome(root, run(job, root / "scratch"))
    return cache[name]


every_case = pytest.mark.parametrize("outcome", CASES, indirect=True)


@torch.no_grad()
def logits(model: torch.nn.Module, processor: Any, images: list[Image.Image]) -> torch.Tensor:
    return model(**processor(images, return_tensors="pt")).logits


@every_case
def test_the_loss_falls_below_that_of_the_majority(outcome):
    assert outcome.result.metrics["eval_loss"] < outcome.result.baseline["eval_loss"]
    assert outcome.result.baseline["eval_accuracy"] < 0.5


@every_case
def test_what_is_delivered_tells_the_classes_apart_in_plain_transformers(outcome):
    model = outcome.loaded()
    if outcome.result.output.kind == "model":
        assert model.config.id2label == dict(enumerate(COLORS))
    processor = AutoImageProcessor.from_pretrained(outcome.root / "model")
    images = [picture(color, (40, 36), seed=999) for color in COLORS.values()]
    found = logits(model, processor, images)
    report = json.loads((outcome.root / "out/report/report.json").read_text())
    wanted = outcome.result.metrics["eval_accuracy"]
    assert report["evaluation"]["confusion"]["labels"] == [*COLORS]
    assert (found.argmax(-1) == torch.arange(3)).float().mean() >= (1.0 if wanted == 1.0 else 0.3)


@every_case
def test_the_weights_of_the_last_step_are_those_that_are_delivered(outcome):
    """Logits are compared before and after delivery by the run itself; here the tensors are."""
    trained = load_file(max((outcome.root / "out/checkpoints").iterdir()) / "trainable.safetensors")
    found = outcome.loaded().state_dict()
    for name, tensor in trained.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name


@every_case
def test_no_tokens_are_counted_where_there_are_none(outcome):
    assert outcome.result.tokens == 0
    assert "tokens" not in (outcome.delivered / "README.md").read_text()
    assert "Tokens" not in (outcome.root / "out/report/index.html").read_text()


@every_case
def test_the_report_shows_images(outcome):
    assert '<img src="data:image/jpeg;base64,' in (outcome.root / "out/report/index.html").read_text()


def test_a_folder_of_timm_is_delivered_as_one(tmp_path):
    import timm

    save_timm(tmp_path / "model", "test_resnet", 64)
    run(an_image_job(tmp_path), tmp_path / "scratch")
    config = json.loads((tmp_path / "out/model/config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("test_resnet", 3)
    assert config["label_names"] == [*COLORS]
    plain = timm.create_model("test_resnet", num_classes=3)
    plain.load_state_dict(load_file(tmp_path / "out/model/model.safetensors"))
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path / "out/model").eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(plain.eval()(pixels), wrapped(pixels).logits)


def test_names_of_classes_in_a_folder_of_timm_give_way(tmp_path):
    save_timm(tmp_path / "model", "test_vit", 64)
    path = tmp_path / "model/config.json"
    names = {"label_names": list("abcde"), "label_descriptions": {name: name * 2 for name in "abcde"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    run(an_image_job(tmp_path), tmp_path / "scratch")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out/model")
    assert model.config.id2label == dict(enumerate(COLORS))


def test_a_head_that_knows_the_classes_is_kept(tmp_path):
    run(an_image_job(tmp_path / "one"), tmp_path / "one/scratch")
    (tmp_path / "one/out/model").rename(tmp_path / "two-model")
    (tmp_path / "two").mkdir()
    (tmp_path / "two-model").rename(tmp_path / "two/model")
    result = run(an_image_job(tmp_path / "two"), tmp_path / "two/scratch")
    assert result.baseline["eval_accuracy"] == 1.0


def test_merged_weights_answer_as_base_and_adapter_together(tmp_path):
    save_tiny_resnet(tmp_path / "model")
    job = an_image_job(tmp_path, "LoRA", output={"merge": True}, **LAST_STAGE)
    outcome = Outcome(tmp_path, run(job, tmp_path / "scratch"))
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "out/model").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out/model")
    images = [picture(color, seed=77) for color in COLORS.values()]
    expected = logits(outcome.loaded(), processor, images)
    assert torch.allclose(logits(merged, processor, images), expected, atol=1e-4)


@pytest.mark.parametrize("strategy", ["Full", "LoRA"])
def test_in_bfloat16_it_trains_and_is_delivered(tmp_path, strategy):
    save_tiny_resnet(tmp_path / "model")
    options = LAST_STAGE if strategy == "LoRA" else {}
    result = run(an_image_job(tmp_path, strategy, model={"dtype": "bfloat16"}, **options), tmp_path / "scratch")
    assert result.metrics["eval_loss"] < result.baseline["eval_loss"]


# --- frozen and learned statistics ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "strategy", "options"),
    [
        ("ResNet", "Partial", {"select": {"layers": {"last": 1}}}),
        ("ResNet", "Partial", {"select": {"modules": ["Head"]}}),
        ("ResNet", "LoRA", LAST_STAGE),
        ("timm's ResNet", "Partial", {"select": {"modules": ["Head"]}}),
    ],
)
def test_batch_norm_moves_only_where_its_parameters_learn(tmp_path, model, strategy, options):
    MODELS[model](tmp_path / "model")
    session = a_session(an_image_job(tmp_path, strategy, **options), tmp_path / "scratch")
    before = state_of(session.trainer.model)
    session.trainer.train()
    session.trainer.checkpoints.close()
    moved = changed(before, state_of(session.trainer.model))
    learning = session.trainer.learning
    statistics = {name for name in moved if name not in learning}
    beside = {name.rpartition(".")[0] for name in learning}
    assert {name.rpartition(".")[0] for name in statistics} <= beside
    assert bool(statistics) == (options == LAST_BLOCK)
    assert learning <= moved


def test_statistics_without_parameters_of_their_own_stand_still_as_checkpoints_do_not_hold_them():
    from finetune_trainer.gathering import trainable_state
    from finetune_trainer.statistics import hold_frozen_statistics

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4, affine=False))
    hold_frozen_statistics(model)
    before = state_of(model)
    model.train()(torch.randn(2, 3, 4, 4))
    assert not changed(before, state_of(model))
    assert trainable_state(model, {"0.weight", "0.bias"}).keys() == {"0.weight", "0.bias"}


# --- stopping and going on -----------------------------------------------------------------------


RESUMED = {
    "ViT, Full": ("ViT", "Full", {}),
    "ResNet, Full": ("ResNet", "Full", {}),
    "ResNet, Partial": ("ResNet", "Partial", LAST_BLOCK),
    "timm's ResNet, LoRA": ("timm's ResNet", "LoRA", {"lora": {"targetModules": ["conv2"]}}),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_that_is_stopped_ends_with_the_same_weights_and_statistics(tmp_path, case):
    model, strategy, options = RESUMED[case]

    def attempt(root: Path, number: int, stop_at: int | None = None) -> Result:
        settings = {"maxSteps": 9, "gradientAccumulationSteps": 2, "perDeviceBatchSize": 3}
        evaluation = {"everySteps": 2}
        job = an_image_job(root, strategy, hyperparameters=settings, evaluation=evaluation, **options)
        context = a_context(job, root / f"scratch-{number}", number)
        if stop_at:
            object.__setattr__(context, "reporter", StopsAt(context.stop, step=stop_at))
        return run(job, context.scratch, number, context)

    MODELS[model](tmp_path / "one/model")
    MODELS[model](tmp_path / "two/model")
    expected = attempt(tmp_path / "one", 1)
    for number, step in enumerate((3, 6), start=1):
        with pytest.raises(StoppedError):
            attempt(tmp_path / "two", number, stop_at=step)
    found = attempt(tmp_path / "two", 9)
    one, two = (
        load_file(tmp_path / side / "out/checkpoints/step-00000009/trainable.safetensors") for side in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert found.metrics == expected.metrics
    assert found.baseline == expected.baseline


def test_batches_are_the_same_in_whatever_process_they_are_made(tmp_path):
    def batches(workers: int) -> list[dict[str, torch.Tensor]]:
        job = an_image_job(tmp_path, hyperparameters={"dataWorkers": workers})
        return list(a_session(job, tmp_path / str(workers)).trainer.get_eval_dataloader())

    for here, there in zip(batches(0), batches(2), strict=True):
        assert here.keys() == there.keys() == {"pixel_values", "labels"}
        assert all(torch.equal(here[name], there[name]) for name in here)


def test_pixels_come_from_either_back_end(tmp_path, monkeypatch):
    import transformers

    save_tiny_vit(tmp_path / "model")
    fast = a_session(an_image_job(tmp_path), tmp_path / "one")
    original = transformers.AutoImageProcessor.from_pretrained
    pil = staticmethod(lambda *args, **named: original(*args, backend="pil", **named))
    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", pil)
    slow = a_session(an_image_job(tmp_path), tmp_path / "two")
    assert (fast.processor.backend, slow.processor.backend) == ("torchvision", "pil")
    one, two = (next(iter(session.trainer.get_eval_dataloader()))["pixel_values"] for session in (fast, slow))
    # The two round resized images differently, to neighbouring values of 255.
    assert (one - two).abs().max() <= 2.01 / 127.5


# --- from a bucket -------------------------------------------------------------------------------


def test_many_images_come_from_a_bucket_with_their_folders(tmp_path, s3_server, bucket, monkeypatch):
    for name, value in s3_server.environ().items():
        monkeypatch.setenv(name, value)
    client = s3_server.client()
    save_tiny_vit(tmp_path / "model")
    for place, part in (("train", 12), ("held", 3)):
        root = write_folders(tmp_path / place, each=part)
        for path in root.rglob("*.png"):
            client.upload_file(str(path), bucket, f"data/{place}/{path.relative_to(root)}")
    client.put_object(Bucket=bucket, Key="data/train/", Body=b"")
    client.put_object(Bucket=bucket, Key="data/train/.DS_Store", Body=b"x")
    dataset = {
        "uri": f"s3://{bucket}/data/train",
        "validation": {"fraction": None, "uri": f"s3://{bucket}/data/held/*/*.png"},
    }
    job = an_image_job(tmp_path, dataset=dataset, output={"uri": f"s3://{bucket}/out"})
    result = run(job, tmp_path / "scratch")
    report = json.loads(client.get_object(Bucket=bucket, Key="out/report/report.json")["Body"].read())
    assert report["data"]["labels"] == {"training": dict.fromkeys(COLORS, 12), "validation": dict.fromkeys(COLORS, 3)}
    assert result.metrics["eval_accuracy"] == 1.0


def test_the_fastest_attention_is_asked_for_only_where_an_architecture_has_it():
    def asked(config, chosen, spec=Attention.AUTO):
        return asked_attention(chosen, spec, config, "AutoModelForImageClassification")

    assert asked(ViTConfig(), "flash_attention_2") == "flash_attention_2"
    assert asked(ResNetConfig(), "flash_attention_2") is None
    assert asked(ResNetConfig(), "flash_attention_2", Attention.FLASH_ATTENTION_2) == "flash_attention_2"
    assert asked(ViTConfig(), "sdpa") is None
    assert asked(ViTConfig(), "eager", Attention.EAGER) == "eager"


# --- tables, streamed or not ----------------------------------------------------------------------


def write_tables(folder: Path, each: int = 16, files: int = 3) -> Path:
    """Parquet files with encoded images, as the datasets library writes them."""
    folder.mkdir(parents=True)
    for file in range(files):
        rows = []
        for number in range(each):
            buffer = io.BytesIO()
            label = (number + file) % 3
            picture([*COLORS.values()][label], seed=100 * file + number).save(buffer, "PNG")
            rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": label})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{file}.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_images_in_tables_are_learned(tmp_path, streaming):
    tables = write_tables(tmp_path / "tables")
    held = write_tables(tmp_path / "held", files=1)
    dataset = {"uri": f"file://{tables}", "validation": {"uri": f"file://{held}"}, "streaming": streaming}
    job = an_image_job(tmp_path, dataset=dataset, task={"labels": [*COLORS]}, hyperparameters={"maxSteps": 16})
    result = run(job, tmp_path / "scratch")
    assert result.metrics["eval_accuracy"] == 1.0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out/model")
    assert model.config.id2label == dict(enumerate(COLORS))
    data = json.loads((tmp_path / "out/report/report.json").read_text())["data"]
    assert data["training"]["rows"] >= (64 if streaming else 48)


def test_a_stream_of_images_goes_on_where_it_was_stopped(tmp_path):
    def attempt(root: Path, number: int, stop_at: int | None = None) -> Result:
        if not (root / "tables").exists():
            write_tables(root / "tables")
        dataset = {"uri": f"file://{root / 'tables'}", "validation": None, "streaming": True}
        settings = {"maxSteps": 16, "perDeviceBatchSize": 4}
        job = an_image_job(root, dataset=dataset, task={"labels": [*COLORS]}, hyperparameters=settings)
        context = a_context(job, root / f"scratch-{number}", number)
        if stop_at:
            object.__setattr__(context, "reporter", StopsAt(context.stop, step=stop_at))
        return run(job, context.scratch, number, context)

    attempt(tmp_path / "one", 1)
    with pytest.raises(StoppedError):
        attempt(tmp_path / "two", 1, stop_at=13)
    attempt(tmp_path / "two", 2)
    one, two = (load_file(tmp_path / side / "out/model/model.safetensors") for side in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_stream_takes_no_images_from_files_beside_it(tmp_path):
    write_folders(tmp_path / "images", each=2)
    rows = [{"image": f"{color}/000.png", "label": color} for color in COLORS]
    write_rows(tmp_path / "images/rows.jsonl", rows)
    dataset = {"streaming": True, "validation": None}
    text = refusal(tmp_path, kind=DataError, dataset=dataset, task={"labels": [*COLORS]})
    assert "rows.jsonl:1: image names the file blue/000.png; a stream takes images from the table itself" in text


# --- refusals ------------------------------------------------------------------------------------


def refusal(root: Path, kind: type = UsageError, strategy: str = "Full", **spec: Any) -> str:
    with pytest.raises(kind) as refused:
        run(an_image_job(root, strategy, **spec), root / "scratch")
    assert refused.value.advice
    assert not (root / "out").exists()
    return f"{refused.value.message} | {refused.value.advice}"


def test_a_model_without_image_processor(tmp_path):
    (save_tiny_vit(tmp_path / "model") / "preprocessor_config.json").unlink()
    text = refusal(tmp_path)
    assert "spec.model.uri: the image processor of" in text
    assert "put the preprocessor_config.json that belongs to the model beside config.json" in text


def test_an_image_processor_that_makes_several_sizes(tmp_path):
    path = save_tiny_vit(tmp_path / "model") / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_resize": False}))
    assert "makes images of several sizes (48 x 64 and 64 x 48)" in refusal(tmp_path)


def test_an_image_processor_of_another_size_than_the_model(tmp_path):
    path = save_tiny_vit(tmp_path / "model") / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"height": 64, "width": 64}}))
    text = refusal(tmp_path)
    assert "does not take the images of 64 x 64 pixels that its image processor makes" in text
    assert "preprocessor_config.json" in text


def test_a_model_that_takes_no_images(tmp_path):
    (tmp_path / "model").mkdir()
    save_tiny_vit(tmp_path / "model")
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "model")
    assert "is BertForMaskedLM, on which there is no head for task ImageClassification" in refusal(tmp_path)


def test_a_model_for_images_without_colours(tmp_path):
    save_tiny_vit(tmp_path / "model", num_channels=1)
    assert "takes images of 1 channels, and images are read as RGB" in refusal(tmp_path)


def test_an_architecture_that_timm_does_not_know(tmp_path):
    path = save_timm(tmp_path / "model", "test_vit", 64) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architecture": "vit_of_tomorrow"}))
    assert "timm does not know the architecture 'vit_of_tomorrow'" in refusal(tmp_path)


def test_recomputation_where_the_architecture_has_none(tmp_path):
    save_tiny_resnet(tmp_path / "model")
    text = refusal(tmp_path, hyperparameters={"gradientCheckpointing": True})
    assert "spec.hyperparameters.gradientCheckpointing: resnet cannot" in text


def test_all_linear_on_a_model_of_convolutions(tmp_path):
    save_tiny_resnet(tmp_path / "model")
    text = refusal(tmp_path, strategy="LoRA")
    assert "the model has no linear layers for all-linear" in text
    assert "name convolutions in targetModules (convolution), or use strategy Partial or Full" in text


def test_convolutions_in_groups_take_no_adapter(tmp_path):
    save_timm(tmp_path / "model", "test_efficientnet", 64)
    text = refusal(tmp_path, strategy="LoRA", lora={"targetModules": ["conv_dw"]})
    assert "conv_dw is a Conv2d in groups, which takes no adapter" in text
    assert "conv_pw" in text
    assert "conv_dw" not in text.partition("|")[2]


def test_an_image_that_changes_after_it_was_looked_at(tmp_path):
    session = a_session(an_image_job(tmp_path), tmp_path / "scratch")
    for path in (tmp_path / "images").rglob("*.png"):
        path.write_bytes(b"gone")
    with pytest.raises(DataError, match=r"blue/0..\.png: the content is no image"):
        next(iter(session.trainer.get_eval_dataloader()))


# --- the architectures of the requirement, at their own size -------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "size"), [("vgg11", 64), ("inception_v3", 299)])
def test_large_architectures_of_timm(tmp_path, architecture, size):
    save_timm(tmp_path / "model", architecture, size)
    write_folders(tmp_path / "images", each=4)
    settings = {"maxSteps": 2, "perDeviceBatchSize": 4, "optimizer": "sgd", "learningRate": 1e-2}
    job = an_image_job(tmp_path, hyperparameters=settings, checkpoint={"everySteps": 2})
    result = run(job, tmp_path / "scratch")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out/model")
    assert model.config.id2label == dict(enumerate(COLORS))
    assert result.total_parameters > 20_000_000
    assert result.steps == 2
