"""Small image models built in code, and pictures that a tiny model can tell apart; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from finetune_api.job import FineTuneJob
from tests.support.jobs import a_job

COLORS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 50, 40)}


def picture(color: Sequence[int], size: tuple[int, int] = (32, 32), seed: int = 0) -> Image.Image:
    """A colour with much noise on it; (width, height)."""
    noise = np.random.default_rng(seed).normal(0, 60, (size[1], size[0], 3))
    return Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8))


def write_folders(root: Path, each: int = 12, ending: str = "png") -> Path:
    """One folder for each colour, with so many pictures."""
    for place, (name, color) in enumerate(COLORS.items()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(each):
            size = (32 + number % 3 * 8, 32 + number % 2 * 16)
            picture(color, size, seed=100 * place + number).save(folder / f"{number:03}.{ending}")
    return root


def save_image_model(folder: Path, model: PreTrainedModel, size: int = 32) -> Path:
    """Write a model with an image processor that brings images to size x size."""
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    return folder


def save_tiny_vit(folder: Path, **changes: Any) -> Path:
    """A ViT of two blocks, width 32, for images of 32 x 32, with a head for two classes that nobody needs."""
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return save_image_model(
        folder, ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **settings | changes))
    )


def save_tiny_resnet(folder: Path, **changes: Any) -> Path:
    """A ResNet of two stages, with BatchNorm whose statistics have seen something."""
    torch.manual_seed(0)
    settings = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**settings | changes))
    model.train()
    model(torch.randn(8, 3, 32, 32))
    return save_image_model(folder, model)


def save_timm(folder: Path, architecture: str, size: int, **arguments: Any) -> Path:
    """A folder as timm writes it for hubs: config.json with `architecture` and pretrained_cfg, weights by timm's names.

    Args:
        size: height and width of the images; of what the architecture was made for, where it takes no other.
        arguments: of timm.create_model.
    """
    import timm

    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=5, **arguments)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # Some begin at 0, and would hide whatever lies before them; no model that has been trained is so.
            torch.nn.init.ones_(module.weight)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    known = {name: value for name, value in model.pretrained_cfg.items() if isinstance(value, int | float | str | list)}
    pretrained = known | {"input_size": [3, size, size], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    config = {"architecture": architecture, "num_classes": 5, "pretrained_cfg": pretrained}
    if arguments:
        config["model_args"] = arguments
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def an_image_job(root: Path, strategy: str = "Full", **spec: Any) -> FineTuneJob:
    """A small job on coloured pictures in folders; a tiny ViT where no model lies under root yet. See a_job."""
    if not (root / "model").exists():
        save_tiny_vit(root / "model")
    if not (root / "images").exists():
        write_folders(root / "images")
    spec["dataset"] = {"uri": f"file://{root / 'images'}"} | spec.get("dataset", {})
    spec["hyperparameters"] = {"learningRate": 2e-3, "maxSteps": 12, "epochs": 10} | spec.get("hyperparameters", {})
    return a_job(root, strategy, "ImageClassification", **spec)
