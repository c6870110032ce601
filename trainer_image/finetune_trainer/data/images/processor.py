"""The model's own image processor: how large its images are, and how their values are scaled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.job import ModelSpec
from finetune_trainer.errors import UsageError
from finetune_trainer.model import FIELD

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ADVICE = (
    "put the preprocessor_config.json that belongs to the model beside config.json (AutoImageProcessor.save_pretrained "
    "writes it); a model of timm has pretrained_cfg in its config.json instead"
)
SHAPES = ((64, 48), (48, 64))
"""Two images that must come out equally large."""


def load_image_processor(folder: Path, spec: ModelSpec, config: PretrainedConfig) -> Any:
    """The image processor that lies beside the weights, on whichever back-end is installed.

    Raises:
        UsageError: there is none, or it does not bring images to one size.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(
            folder, config=config, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
        _check(processor, spec)
    except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{FIELD}: the image processor of {spec.uri} cannot be used: {error}", ADVICE) from error
    return processor


def _check(processor: Any, spec: ModelSpec) -> None:
    from PIL import Image

    sizes = [tuple(_pixels(processor, Image.new("RGB", shape)).shape) for shape in SHAPES]
    if len(set(sizes)) > 1:
        found = " and ".join(f"{height} x {width}" for *_, height, width in sizes)
        raise UsageError(
            f"{FIELD}: the image processor of {spec.uri} makes images of several sizes ({found}), which cannot be in "
            "one batch",
            "set size to a height and a width in preprocessor_config.json, or do_center_crop with crop_size",
        )


def _pixels(processor: Any, image: Any) -> Any:
    return processor([image], return_tensors="pt")["pixel_values"]
