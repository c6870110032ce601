"""From folders and tables of images to rows with class numbers; what cannot be used is named by file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_api.job import DatasetSpec
from finetune_trainer.data.images.index import encoded
from finetune_trainer.data.images.preparation import PreparedImages, prepare_images
from finetune_trainer.data.sources import NamedFile
from finetune_trainer.errors import DataError, UsageError
from tests.support.images import COLORS, picture, write_folders


def files_in(root: Path) -> list[NamedFile]:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return [NamedFile(f"s3://bucket/{path.relative_to(root)}", path) for path in paths]


def prepare(root: Path, labels: list[str] | None = None, held: Path | None = None, **spec: Any) -> PreparedImages:
    spec = {"uri": "s3://bucket/images"} | spec
    held_files = files_in(held) if held else []
    settings = {"seed": 3, "scratch": root.parent / "scratch", "validation_files": held_files}
    return prepare_images(files_in(root), DatasetSpec.from_wire(spec), labels, **settings)


def named(prepared: PreparedImages, part: str = "train") -> list[tuple[str, str]]:
    rows = getattr(prepared, part)
    return [(Path(row["file"]).name, prepared.classes[row["labels"]]) for row in rows]


@pytest.fixture
def root(tmp_path) -> Path:
    return write_folders(tmp_path / "images", each=4)


def png(color: str, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(COLORS[color], seed=seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(path: Path, columns: dict[str, list[Any]], features: dict[str, Any] | None = None) -> Path:
    """A parquet file; with features as the datasets library writes their names into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path.parent


# --- folders -------------------------------------------------------------------------------------


def test_the_class_of_an_image_is_the_folder_that_it_lies_in(root):
    prepared = prepare(root)
    assert prepared.classes == ("blue", "green", "red")
    expected = [(f"{number:03}.png", color) for color in prepared.classes for number in range(4)]
    assert named(prepared) == expected
    assert prepared.validation is None
    assert prepared.report["labels"] == {"training": dict.fromkeys(COLORS, 4)}


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "png", "webp", "bmp", "gif", "PNG"])
def test_all_usual_endings_are_images(tmp_path, ending):
    assert len(prepare(write_folders(tmp_path / "images", 2, ending)).train) == 6


def test_the_order_of_task_labels_is_that_of_the_outputs(root):
    prepared = prepare(root, labels=["red", "blue", "green"])
    assert prepared.classes == ("red", "blue", "green")
    assert named(prepared)[0] == ("000.png", "blue")
    assert prepared.train[0]["labels"] == 1


def test_what_is_no_image_is_left_out_and_told(root):
    for name in ("README.md", "red/notes.txt", "red/._000.png", ".trash/x.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    prepared = prepare(root)
    assert len(prepared.train) == 12
    (warning,) = prepared.report["warnings"]
    assert warning.startswith("training: 4 files are no images and were left out: s3://bucket/.trash/x.png")


def test_broken_images_are_named_by_file_all_at_once(root):
    (root / "red/001.png").write_bytes(b"no image")
    whole = (root / "blue/002.png").read_bytes()
    (root / "blue/002.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as refused:
        prepare(root)
    assert refused.value.message.startswith("s3://bucket/blue/002.png: the image is damaged or cut off")
    assert "s3://bucket/red/001.png: the content is no image" in refused.value.message
    assert "onInvalidRow to Drop" in refused.value.advice


def test_broken_images_can_be_dropped_and_are_then_told(root):
    (root / "red/001.png").write_bytes(b"")
    prepared = prepare(root, onInvalidRow="Drop")
    assert len(prepared.train) == 11
    assert prepared.report["training"]["dropped"]["first"] == ["s3://bucket/red/001.png: the image is empty"]
    assert prepared.report["warnings"][0].startswith("training: 1 of 12 rows were dropped")


def test_a_class_of_which_nothing_is_left_is_none(root):
    for path in (root / "red").iterdir():
        path.write_bytes(b"")
    assert prepare(root, onInvalidRow="Drop").classes == ("blue", "green")


def test_where_no_image_is_left_there_is_no_dataset(root):
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="the image is empty") as refused:
        prepare(root, onInvalidRow="Drop")
    assert "not one of its images can be used" in refused.value.advice


def test_an_image_at_another_depth_has_no_clear_class(root):
    for name in ("loose.png", "red/deeper/000.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(png("red"))
    with pytest.raises(DataError) as refused:
        prepare(root)
    assert "s3://bucket/loose.png: the image lies at another depth than most" in refused.value.message
    assert "s3://bucket/red/deeper/000.png" in refused.value.message


def test_parts_that_are_taken_together_are_told(tmp_path):
    for part in ("train", "test"):
        write_folders(tmp_path / "images" / part, each=2)
    prepared = prepare(tmp_path / "images")
    assert prepared.report["labels"]["training"] == dict.fromkeys(COLORS, 4)
    (warning,) = prepared.report["warnings"]
    assert warning.startswith("training: the classes are gathered from 2 folders (test, train)")


def test_a_folder_that_task_labels_does_not_know_is_refused(root):
    with pytest.raises(DataError, match=r"s3://bucket/red/000.png: .*'red'.* task.labels") as refused:
        prepare(root, labels=["green", "blue"])
    assert "3 more rows" in refused.value.message


def test_a_class_without_images_is_told(root):
    prepared = prepare(root, labels=["red", "blue", "green", "yellow"])
    assert any("yellow" in warning for warning in prepared.report["warnings"])
    assert prepared.report["labels"]["training"]["yellow"] == 0


def test_one_class_alone_is_nothing_to_learn(root):
    with pytest.raises(DataError, match="nothing to tell apart"):
        prepare(root / "red")


def test_a_prefix_without_images(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="the dataset has no files"):
        prepare(tmp_path / "images")
    (tmp_path / "images/README.md").write_text("x")
    with pytest.raises(DataError, match="no file of the dataset is an image"):
        prepare(tmp_path / "images", format="image-folder")


def test_an_image_folder_has_no_columns(root):
    with pytest.raises(UsageError, match="an image folder has no columns"):
        prepare(root, columns={"label": "animal"})


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["bytes", "datasets"])
def test_a_table_holds_encoded_images(tmp_path, shape):
    images: list[Any] = [png(color, seed) for seed in range(3) for color in COLORS]
    if shape == "datasets":
        images = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(images)]
    prepared = prepare(write_table(tmp_path / "t/part.parquet", {"image": images, "label": [*COLORS] * 3}))
    assert prepared.classes == ("blue", "green", "red")
    assert [prepared.classes[row["labels"]] for row in prepared.train] == [*COLORS] * 3
    assert encoded(prepared.train[4]) == png("green", 1)
    assert prepared.report["format"] == "labeled"


def test_columns_may_have_other_names(tmp_path):
    columns = {"picture": [png(color) for color in COLORS], "colour": [*COLORS], "label": [0, 0, 0]}
    root = write_table(tmp_path / "t/part.parquet", columns)
    assert len(prepare(root, columns={"image": "picture", "label": "colour"}).classes) == 3
    with pytest.raises(UsageError, match="text is not read"):
        prepare(root, columns={"text": "colour"})
    with pytest.raises(DataError, match="image is missing; the fields here are picture, colour, label"):
        prepare(root)


def test_numbers_are_those_of_task_labels_where_it_has_names(tmp_path):
    root = write_table(tmp_path / "t/part.parquet", {"image": [png("red")] * 3, "label": [1, 0, 1]})
    prepared = prepare(root, labels=["cat", "dog"])
    assert [prepared.classes[row["labels"]] for row in prepared.train] == ["dog", "cat", "dog"]


def test_the_order_of_the_models_own_classes_is_kept_where_they_are_the_same(root):
    files, spec = files_in(root), DatasetSpec.from_wire({"uri": "s3://bucket/images"})
    settings = {"seed": 3, "scratch": root.parent / "scratch"}
    same = prepare_images(files, spec, None, order=("red", "green", "blue"), **settings)
    assert same.classes == ("red", "green", "blue")
    assert [same.classes[row["labels"]] for row in same.train][:1] == ["blue"]
    other = prepare_images(files, spec, None, order=("red", "green", "yellow"), **settings)
    assert other.classes == ("blue", "green", "red")


def test_whole_numbers_are_classes_in_the_order_of_their_size(tmp_path):
    numbers = [10, 9, 2, 10]
    root = write_table(tmp_path / "t/part.parquet", {"image": [png("red")] * 4, "label": numbers})
    prepared = prepare(root)
    assert prepared.classes == ("2", "9", "10")
    assert [row["labels"] for row in prepared.train] == [2, 1, 0, 2]


def test_numbers_have_the_names_that_the_datasets_library_has_written(tmp_path):
    features = {"image": {"_type": "Image"}, "label": {"names": ["red", "blue"], "_type": "ClassLabel"}}
    columns = {"image": [png("red"), png("blue"), png("blue")], "label": [0, 1, 1]}
    prepared = prepare(write_table(tmp_path / "t/part.parquet", columns, features))
    assert prepared.classes == ("red", "blue")
    assert [row["labels"] for row in prepared.train] == [0, 1, 1]


def test_metadata_of_others_is_none_of_ours(tmp_path):
    root = write_table(tmp_path / "t/part.parquet", {"image": [png("red")] * 2, "label": [0, 1]})
    table = pq.read_table(root / "part.parquet").replace_schema_metadata({"huggingface": "x"})
    pq.write_table(table, root / "part.parquet")
    assert prepare(root).classes == ("0", "1")


def test_a_number_without_a_name_is_a_problem(tmp_path):
    features = {"label": {"names": ["red", "blue"], "_type": "ClassLabel"}}
    columns = {"image": [png("red")] * 3, "label": [0, 1, 2]}
    root = write_table(tmp_path / "t/part.parquet", columns, features)
    with pytest.raises(DataError, match=r"part.parquet:3: label is the number 2, but the file names 0 to 1"):
        prepare(root)


def test_a_table_of_names_takes_the_images_beside_it(root):
    rows = [{"image": f"{color}/00{number}.png", "label": color.upper()} for number in range(2) for color in COLORS]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(root)
    assert prepared.classes == ("BLUE", "GREEN", "RED")
    assert encoded(prepared.train[0]) == root / "blue/000.png"
    assert prepared.report["ignoredFiles"] == []
    (root / "train.jsonl").write_text('{"image": "../../etc/passwd", "label": "a"}\n')
    with pytest.raises(DataError, match=r"train.jsonl:1: image names ../../etc/passwd, which is not among the files"):
        prepare(root)


@pytest.mark.parametrize(
    ("image", "label", "words"),
    [
        (b"x", "red", "part.parquet:2: the content is no image"),
        (None, "red", "part.parquet:2: image is null"),
        (png("red"), None, "part.parquet:2: label is null"),
        (png("red"), " ", "part.parquet:2: label is empty"),
    ],
)
def test_wrong_rows_are_named_by_file_and_row(tmp_path, image, label, words):
    columns = {"image": [png("red"), image, png("blue")], "label": ["red", label, "blue"]}
    root = write_table(tmp_path / "t/part.parquet", columns)
    with pytest.raises(DataError, match=words):
        prepare(root)
    assert len(prepare(root, onInvalidRow="Drop").train) == 2


# --- parts ---------------------------------------------------------------------------------------


def test_of_every_class_the_same_share_is_held_out(tmp_path):
    root = write_folders(tmp_path / "images", each=20)
    prepared = prepare(root, validation={"fraction": 0.25})
    assert prepared.report["labels"] == {"training": dict.fromkeys(COLORS, 15), "validation": dict.fromkeys(COLORS, 5)}
    trained, held = named(prepared), named(prepared, "validation")
    assert not set(trained) & set(held)
    assert named(prepare(root, validation={"fraction": 0.25}), "validation") == held


def test_held_out_images_may_have_a_folder_of_their_own(tmp_path, root):
    held = write_folders(tmp_path / "held", each=2)
    prepared = prepare(root, held=held, validation={"uri": "s3://bucket/held"})
    assert (len(prepared.train), len(prepared.validation)) == (12, 6)
    (held / "green").rename(held / "yellow")
    with pytest.raises(DataError, match=r"s3://bucket/yellow/000.png: .*'yellow'"):
        prepare(root, held=held, validation={"uri": "s3://bucket/held"})


def test_what_is_prepared_is_taken_up_again(root):
    first = prepare(root)
    made = {path: path.stat().st_mtime_ns for path in (root.parent / "scratch").rglob("*.arrow")}
    assert prepare(root).train[5] == first.train[5]
    assert {path: path.stat().st_mtime_ns for path in (root.parent / "scratch").rglob("*.arrow")} == made
    picture(COLORS["red"], seed=9).save(root / "red/004.png")
    assert len(prepare(root).train) == 13


def test_progress_is_told_and_may_end_it(root):
    class StoppedError(Exception):
        pass

    seen = []

    def stop(part, images):
        seen.append((part, images))
        raise StoppedError

    for number in range(200):
        picture((0, 0, 0), (4, 4), number).save(root / f"red/{number:04}.png")
    with pytest.raises(StoppedError):
        prepare_images(
            files_in(root), DatasetSpec.from_wire({"uri": "s3://b/x"}), None, seed=1, scratch=root.parent / "s",
            progress=stop,
        )  # fmt: skip
    assert seen == [("training", 200)]


def test_the_report_shows_images_of_bounded_size(tmp_path):
    root = write_folders(tmp_path / "images", each=30)
    shown = prepare(root).report["images"]
    assert 3 <= len(shown) <= 12
    assert {item["class"] for item in shown} == set(COLORS)
    assert all(item["image"].startswith("data:image/jpeg;base64,") for item in shown)
    assert sum(len(item["image"]) for item in shown) < 60_000


def test_sizes_are_told(tmp_path, root):
    picture(COLORS["red"], (300, 20)).save(root / "red/wide.png")
    picture(COLORS["red"], (5, 6)).save(root / "red/small.png")
    assert prepare(root).report["training"]["pixels"] == {"smallest": "5 x 6", "largest": "300 x 20"}


def test_numbers_of_classes_are_plain_integers(root):
    labels = prepare(root).train["labels"]
    assert np.asarray(labels).dtype == np.int64
