"""Small models of every family, with random but reproducible weights; some thousand parameters each."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from tests.support.models import tiny_bert_config, tiny_llama_config

WIDTH = 32
VOCABULARY = 272
IMAGE = 16
"""Height and width of the images that ViT takes and ResNet may take, in pixels."""
SEQUENCE = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}


def tiny_llama(num_labels: int | None = None, **changes: Any) -> PreTrainedModel:
    """Llama of two blocks: a language model, or a classifier (regressor, reward model) of so many labels."""
    torch.manual_seed(0)
    if num_labels is None:
        return LlamaForCausalLM(tiny_llama_config(**changes))
    return LlamaForSequenceClassification(tiny_llama_config(num_labels=num_labels, **changes))


def tiny_bert(num_labels: int = 2, **changes: Any) -> PreTrainedModel:
    """BERT of three blocks with a classifier."""
    settings = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "num_labels": num_labels,
    }
    torch.manual_seed(0)
    return BertForSequenceClassification(tiny_bert_config(**SEQUENCE | settings | changes))


def tiny_gpt2(**changes: Any) -> PreTrainedModel:
    """GPT-2 of three blocks, a language model whose head shares the embedding; its linear layers are Conv1D."""
    settings = {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 128}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SEQUENCE | settings | changes))


def tiny_mixtral() -> PreTrainedModel:
    """Mixtral of two blocks with four experts each, which are one tensor in the model and several in its files."""
    settings = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SEQUENCE, **settings, num_key_value_heads=2, num_local_experts=4))


def tiny_vit(num_labels: int = 3, **changes: Any) -> PreTrainedModel:
    """ViT of three blocks over four patches with a classifier."""
    settings = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE,
        "patch_size": IMAGE // 2,
        "num_labels": num_labels,
    }
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**settings | changes))


def tiny_resnet(num_labels: int = 3, **changes: Any) -> PreTrainedModel:
    """ResNet of two stages with two blocks each, and a classifier."""
    settings = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}
    torch.manual_seed(0)
    return ResNetForImageClassification(ResNetConfig(**settings | {"num_labels": num_labels} | changes))


def timm_model(architecture: str, num_labels: int = 3, **model_args: Any) -> PreTrainedModel:
    """One of timm's models, which come in one size only.

    Args:
        model_args: for timm, such as `mlp_ratio=0.01` for vgg11, which then has 11 million parameters and not 129.
    """
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=architecture, num_labels=num_labels, model_args=model_args)
    return TimmWrapperForImageClassification(config)
