"""Models of every family answer from their files as they did in memory, with one block of them held at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from finetune_trainer import verification
from finetune_trainer.errors import TrainerError
from finetune_trainer.rereading import Rereading
from finetune_trainer.structure import Block, Structure
from finetune_trainer.tensors import Located
from tests.support.architectures import (
    timm_model,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_resnet,
    tiny_vit,
)

IDS = {"input_ids": torch.arange(4, 44).reshape(2, 20)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
CPU = torch.device("cpu")


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, torch.Tensor]]] = {
    "Llama": (tiny_llama, IDS),
    "Llama, tied": (lambda: tiny_llama(tie_word_embeddings=True), IDS),
    "Llama, a classifier": (lambda: tiny_llama(num_labels=3), IDS),
    "Mixtral": (tiny_mixtral, IDS),
    "GPT-2": (tiny_gpt2, IDS),
    "BERT": (tiny_bert, IDS),
    "ViT": (tiny_vit, PIXELS),
    "ResNet": (tiny_resnet, PIXELS),
    "VGG of timm": (lambda: timm_model("vgg11"), {"pixel_values": torch.ones(1, 3, 32, 32)}),
}


def skeleton_of(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Of the class that was saved, without numbers."""
    with torch.device("meta"):
        return type(model)(AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_answers_from_its_files_as_it_did_in_memory(tmp_path, name):
    build, probe = MODELS[name]
    model = build()
    model.save_pretrained(tmp_path)
    again = skeleton_of(model, tmp_path)
    beats: list[None] = []
    reading = Rereading(again, Located(again, tmp_path), torch.float32, CPU, lambda: beats.append(None))
    torch.testing.assert_close(verification.logits(again, probe), verification.logits(model, probe))
    blocks = Structure.of(again).blocks
    assert len(beats) == len(blocks), "it is alive in every block"
    assert held(blocks[:-1]) == {4}, "of each tensor that lies in a block that is not at work one number"
    reading.let_go()
    assert held(blocks) == {4}
    assert {parameter.untyped_storage().nbytes() for parameter in again.parameters()} == {4}


def held(blocks: Sequence[Block]) -> set[int]:
    """Bytes of the tensors of blocks."""
    return {parameter.untyped_storage().nbytes() for block in blocks for parameter in block.module.parameters()}


def test_a_tensor_that_the_files_lack_is_named(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        save_file({key: copy.deepcopy(tensor) for key, tensor in tensors.items() if key != name}, path)
        with pytest.raises(TrainerError, match=name):
            verification.logits(_reread(model, tmp_path), IDS)


def _reread(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    again = skeleton_of(model, folder)
    Rereading(again, Located(again, folder), torch.float32, CPU, lambda: None)
    return again
