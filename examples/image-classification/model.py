"""A small ViT and a small ResNet with random weights, as folders that every trainer reads."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

PIXELS = 32


def vit() -> PreTrainedModel:
    """Four blocks of width 64 over 16 patches: 0.2 million parameters."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=PIXELS,
            patch_size=8,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            # The usual 0.02 suits widths ten times this one; from it so small a model learns slowly.
            initializer_range=0.1,
        )
    )


def resnet() -> PreTrainedModel:
    """Three stages of one residual block: 0.1 million parameters."""
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic")
    )


def write(folder: Path) -> Path:
    """Write vit/ and resnet/ with their image processors; what is there already is kept."""
    for name, build in (("vit", vit), ("resnet", resnet)):
        if not (folder / name / "config.json").exists():
            torch.manual_seed(0)
            ViTImageProcessor(size={"height": PIXELS, "width": PIXELS}).save_pretrained(folder / name)
            build().save_pretrained(folder / name)
    return folder
