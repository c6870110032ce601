"""Layers and kinds are found by structure, in every family of models, wrapped or not."""

from __future__ import annotations

import re

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptEncoderConfig, get_peft_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForCausalLM,
    BartConfig,
    BartForSequenceClassification,
    BitsAndBytesConfig,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SwinConfig,
    SwinForImageClassification,
)

from finetune_api.selection import ModuleKind
from finetune_trainer.structure import Place, Structure
from tests.support.architectures import (
    SEQUENCE,
    timm_model,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_resnet,
    tiny_vit,
)
from tests.support.models import save_tiny_llama

A, F, N, E, H = ModuleKind
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

# Patterns of names, the first that matches counts, and the kind and whether it lies in a block.
LLAMA = {r"norm": N, r"self_attn": A, r"mlp": F, r"embed": E, r"lm_head|score": H}
BERT = {
    r"LayerNorm": N,
    r"\.attention\.": A,
    r"intermediate|layer\.\d+\.output": F,
    r"embeddings": E,
    r"pooler|classifier": H,
}
GPT2 = {r"\.ln_": N, r"\.attn\.": A, r"\.mlp\.": F, r"wte|wpe": E}
VIT = {r"layernorm": N, r"\.attention\.": A, r"\.mlp\.": F, r"embeddings": E, r"classifier": H}
CONVOLUTIONS = {r"classifier|head|pre_logits|\.fc\.": H, r"": None}
FAMILIES = {
    "Llama": (tiny_llama, LLAMA, 2, "model.layers.0"),
    "Llama with a tied head": (lambda: tiny_llama(tie_word_embeddings=True), LLAMA, 2, "model.layers.0"),
    "Llama that classifies": (lambda: tiny_llama(2), LLAMA, 2, "model.layers.0"),
    "Llama of one block": (lambda: tiny_llama(num_hidden_layers=1), LLAMA, 1, "model.layers.0"),
    "BERT": (tiny_bert, BERT, 3, "bert.encoder.layer.0"),
    "GPT-2": (tiny_gpt2, GPT2, 3, "transformer.h.0"),
    "ViT": (tiny_vit, VIT, 3, "vit.layers.0"),
    "ResNet": (tiny_resnet, CONVOLUTIONS, 4, "resnet.encoder.stages.0.layers.0"),
    "timm's VGG": (lambda: _on_meta(timm_model, "vgg11"), CONVOLUTIONS, 8, "timm_model.features.0"),
    "timm's VGG with norms": (lambda: _on_meta(timm_model, "vgg11_bn"), CONVOLUTIONS, 8, "timm_model.features.0"),
    "timm's Inception": (lambda: _on_meta(timm_model, "inception_v3"), CONVOLUTIONS, 16, "timm_model.Conv2d_1a_3x3"),
    "timm's ResNet": (lambda: _on_meta(timm_model, "resnet18"), CONVOLUTIONS, 8, "timm_model.layer1.0"),
    "timm's ViT": (lambda: _on_meta(timm_model, "vit_tiny_patch16_224"),
                   {r"norm": N, r"attn": A, r"mlp": F, r"embed|cls_token": E, r"head": H}, 12, "timm_model.blocks.0"),
    "OPT": (lambda: OPTForCausalLM(OPTConfig(**SEQUENCE, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
                                             num_attention_heads=4, word_embed_proj_dim=16)),
            {r"layer_norm": N, r"self_attn": A, r"fc\d": F, r"embed|project_in": E, r"project_out": E},
            2, "model.decoder.layers.0"),
    "DistilBERT": (lambda: DistilBertForSequenceClassification(
                       DistilBertConfig(vocab_size=272, dim=32, hidden_dim=64, n_layers=2, n_heads=4)),
                   {r"[Nn]orm": N, r"attention": A, r"ffn": F, r"embeddings": E, r"classifier": H},
                   2, "distilbert.transformer.layer.0"),
    "ALBERT": (lambda: AlbertForSequenceClassification(AlbertConfig(**SMALL, vocab_size=272, embedding_size=16)),
               {r"[Nn]orm": N, r"attention": A, r"ffn": F, r"embedding": E, r"pooler|classifier": H},
               1, "albert.encoder.albert_layer_groups.0.albert_layers.0"),
    "Qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**SEQUENCE, **SMALL, num_key_value_heads=2, head_dim=16)),
              LLAMA, 2, "model.layers.0"),
    "Mixtral": (tiny_mixtral, LLAMA, 2, "model.layers.0"),
    "Swin": (lambda: SwinForImageClassification(SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2],
                                                           num_heads=[2, 2], window_size=4)),
             {r"norm": N, r"attention": A, r"\.mlp\.": F, r"downsample": None, r"embeddings": E,
              r"classifier": H}, 4, "swin.encoder.layers.0.blocks.0"),
}  # fmt: skip


def _on_meta(build, *arguments):
    with torch.device("meta"):
        return build(*arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_its_kind(family):
    build, patterns, layers, first = FAMILIES[family]
    model = build()
    structure = Structure.of(model)
    assert list(structure.places) == [name for name, _ in model.named_parameters()]
    assert structure.layers == layers
    assert structure.blocks[0].name == first
    found = {name: place.kind for name, place in structure.places.items()}
    assert found == {name: next(k for p, k in patterns.items() if re.search(p, name)) for name in found}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_block_has_its_layer(family):
    structure = Structure.of(FAMILIES[family][0]())
    for name, place in structure.places.items():
        around = [block.layer for block in structure.blocks if name.startswith(block.name + ".")]
        if around:
            assert (place.layer, place.depth) == (around[0], around[0] + 1)
        elif place.layer is None:
            assert place.depth in (0, structure.layers + 1)
        else:
            assert re.search(r"downsample|features", name), "only what lies between blocks goes with one of them"


def test_what_lies_before_and_after_the_blocks_is_told_apart():
    depths = {name: place.depth for name, place in Structure.of(tiny_bert()).places.items() if place.layer is None}
    assert {name for name, depth in depths.items() if depth == 0} == {n for n in depths if "embeddings" in n}
    llama = Structure.of(tiny_llama()).places
    assert (llama["model.embed_tokens.weight"], llama["model.norm.weight"]) == (Place(None, E, 0), Place(None, N, 3))
    opt = Structure.of(FAMILIES["OPT"][0]()).places
    assert opt["model.decoder.final_layer_norm.weight"].depth == 3, "which OPT registers before its blocks"


OUTPUTS = {
    "Llama": ("self_attn.o_proj", "mlp.down_proj"),
    "BERT": ("attention.output.dense", "output.dense"),
    "GPT-2": ("attn.c_proj", "mlp.c_proj"),
    "ViT": ("attention.o_proj", "mlp.fc2"),
    "timm's ViT": ("attn.proj", "mlp.fc2"),
    "OPT": ("self_attn.out_proj", "fc2"),
    "DistilBERT": ("attention.out_lin", "ffn.lin2"),
    "ALBERT": ("attention.dense", "ffn_output"),
    "Qwen3": ("self_attn.o_proj", "mlp.down_proj"),
    "Mixtral": ("self_attn.o_proj", None),
    "Swin": ("attention.o_proj", "mlp.fc2"),
    "ResNet": (None, None),
}


@pytest.mark.parametrize("family", OUTPUTS)
def test_the_last_projections_of_a_block_are_known(family):
    model = FAMILIES[family][0]()
    for block in Structure.of(model).blocks:
        found = (block.attention_output, block.feed_forward_output)
        names = tuple(part and part.name.removeprefix(block.name + ".") for part in found)
        assert names == OUTPUTS[family]
        assert all(part is None or model.get_submodule(part.name) is part.module for part in found)


def test_a_norm_within_attention_is_a_norm():
    places = Structure.of(FAMILIES["Qwen3"][0]()).places
    assert places["model.layers.1.self_attn.q_norm.weight"] == Place(1, N, 2)


def test_norms_are_told_by_their_classes():
    assert Structure.of(tiny_resnet()).norms == ["BatchNorm2d"]
    assert Structure.of(tiny_llama()).norms == ["LlamaRMSNorm"]


def test_the_larger_side_of_an_encoder_and_decoder_has_the_blocks():
    config = BartConfig(**SEQUENCE, d_model=32, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=64,
                        decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4)  # fmt: skip
    structure = Structure.of(BartForSequenceClassification(config))
    assert [block.name for block in structure.blocks] == [f"model.decoder.layers.{i}" for i in range(3)]


@pytest.mark.parametrize("family", ["Llama", "BERT", "GPT-2", "ViT"])
def test_what_an_adapter_adds_lies_where_its_module_lies(family):
    model = FAMILIES[family][0]()
    plain = Structure.of(model).places
    head = ["classifier"] if family in ("BERT", "ViT") else ["ln_f"] if family == "GPT-2" else ["lm_head", "norm"]
    wrapped = Structure.of(get_peft_model(model, LoraConfig(target_modules="all-linear", modules_to_save=head)))
    assert any("lora_A" in name for name in wrapped.places)
    for name, place in wrapped.places.items():
        bare = re.sub(r"^base_model\.model\.|\.(base_layer|original_module|modules_to_save\.default)(?=\.)", "", name)
        assert place == plain[re.sub(r"\.lora_[AB]\.default(?=\.)", "", bare)], name


def test_output_projections_with_an_adapter_are_the_adapted_ones():
    structure = Structure.of(get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear")))
    outputs = [structure.blocks[1].attention_output.name, structure.blocks[1].feed_forward_output.name]
    prefix = "base_model.model.model.layers.1"
    assert outputs == [f"{prefix}.self_attn.o_proj", f"{prefix}.mlp.down_proj"]


def test_factors_of_ia3_lie_where_their_modules_lie():
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    places = Structure.of(get_peft_model(tiny_llama(), config)).places
    factors = {name: place for name, place in places.items() if "ia3_l" in name}
    assert {place.kind for place in factors.values()} == {A, F}
    assert {place.layer for place in factors.values()} == {0, 1}


def test_virtual_tokens_have_no_layer_and_no_kind():
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16)
    model = get_peft_model(tiny_llama(), config)
    places = Structure.of(model).places
    learning = {places[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {Place(None, None, 3)}
    assert places["base_model.model.embed_tokens.weight"].kind is E


def test_a_module_added_to_a_block_lies_in_its_layer():
    model = tiny_llama()
    model.model.layers[1].bottleneck = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 8), nn.Linear(8, 64))
    place = Structure.of(model).places["model.layers.1.bottleneck.1.weight"]
    assert place.layer == 1


def test_layers_in_four_bits_are_linear_layers(tmp_path):
    save_tiny_llama(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    structure = Structure.of(model)
    assert structure.places == Structure.of(tiny_llama()).places
    assert structure.blocks[0].feed_forward_output.name == "model.layers.0.mlp.down_proj"


def test_the_meta_device_is_enough():
    for build in (tiny_llama, tiny_bert, tiny_gpt2, tiny_vit, tiny_resnet):
        assert Structure.of(_on_meta(build)).places == Structure.of(build()).places
