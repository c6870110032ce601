"""The base model: is the folder one that can be trained, and loading it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from finetune_api.job import FineTuneJobSpec, ModelSpec
from finetune_trainer.errors import UsageError
from finetune_trainer.hardware import asked_attention
from finetune_trainer.quantization import only_blocks

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FIELD = "spec.model.uri"
TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NOT_NEEDED = (*PICKLES, ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".tflite")
"""Other forms of the same weights that lie beside the safetensors on many hubs: gigabytes that nobody reads."""
DROPOUT = re.compile(r"(^|_)(dropout|pdrop)(_|$)")
"""Names of dropout probabilities in configurations: attention_dropout, hidden_dropout_prob, resid_pdrop..."""


class ModelFile(NamedTuple):
    """One file of the model's folder: name relative to it, size in bytes, and the store's tag of its content."""

    name: str
    size: int
    etag: str


def needed(files: Iterable[ModelFile], uri: str) -> list[ModelFile]:
    """The files that have to be fetched, out of all that lie in the folder.

    Raises:
        UsageError: the folder holds no model that can be trained; known before anything large is downloaded.
    """
    found = list(files)
    names = {file.name for file in found}
    if "config.json" not in names:
        raise UsageError(
            f"{FIELD}: {uri} has no config.json ({_some(names)})",
            "name the folder that save_pretrained wrote: config.json, *.safetensors and the tokenizer's files",
        )
    if not any(name.endswith(".safetensors") for name in names):
        _refuse_without_weights(names, uri)
    return [file for file in found if not file.name.endswith(NOT_NEEDED) and not file.name.startswith("original/")]


def _refuse_without_weights(names: set[str], uri: str) -> None:
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        raise UsageError(
            f"{FIELD}: {uri} has its weights only as pickles ({pickles[0]}), which can run any code when they are read",
            "convert them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder) writes safetensors",
        )
    raise UsageError(
        f"{FIELD}: {uri} has no weights: no *.safetensors ({_some(names)})",
        "upload the weights beside config.json; perhaps an earlier upload was cut off",
    )


def refuse_without_tokenizer(names: set[str], uri: str) -> None:
    """Raise UsageError where no tokenizer lies beside the weights."""
    if not names & TOKENIZER_FILES:
        raise UsageError(
            f"{FIELD}: {uri} has no tokenizer ({_some(names)})",
            "put the tokenizer's files (tokenizer.json, tokenizer_config.json) beside config.json",
        )


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5]) or "it is empty"
    return f"found: {shown}, ..." if len(names) > 5 else f"found: {shown}"


def digest(files: Iterable[ModelFile]) -> str:
    """A name for exactly these files; a checkpoint belongs to the base that it was trained on."""
    lines = sorted(f"{file.name}\t{file.size}\t{file.etag}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_config(folder: Path, spec: ModelSpec) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        UsageError: it cannot be read, or needs code that may not run.
    """
    from transformers import AutoConfig

    raw = _read_config(folder, spec.uri)
    _refuse_code(raw, spec)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise UsageError(f"{FIELD}: config.json of {spec.uri} cannot be used: {error}") from error


def _read_config(folder: Path, uri: str) -> dict[str, Any]:
    try:
        raw = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as error:
        raise UsageError(f"{FIELD}: config.json of {uri} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{FIELD}: config.json of {uri} is not a JSON object")
    return raw


def _refuse_code(raw: dict[str, Any], spec: ModelSpec) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.utils import is_timm_config_dict

    if raw.get("model_type") in CONFIG_MAPPING_NAMES or spec.trust_remote_code or is_timm_config_dict(raw):
        return
    if "auto_map" in raw:
        raise UsageError(
            f"spec.model.trustRemoteCode: {spec.uri} can only be loaded by running the Python code that lies beside it",
            "read that code; if you trust it, set model.trustRemoteCode to true",
        )
    raise UsageError(
        f"{FIELD}: transformers does not know the model type {raw.get('model_type')!r} of {spec.uri}",
        "use a supported architecture, or a newer trainer image",
    )


def refuse_other_architectures(config: PretrainedConfig, spec: FineTuneJobSpec) -> None:
    """Raise UsageError for a configuration that is not a causal language model's."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures = config.architectures or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not own:
        architectures = architectures or [config.model_type]
    elif not architectures or own or known & set(architectures):
        return
    raise UsageError(
        f"{FIELD}: {spec.model.uri} is {', '.join(map(str, architectures))}, not a causal language model, which "
        f"task {spec.task.type.value} needs",
        "use a model with a ...ForCausalLM architecture",
    )


def check_positions(config: PretrainedConfig, max_length: int, reserved: int = 0) -> None:
    """Raise UsageError when rows, with what is put before them, may be longer than what the model has positions for."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length + reserved > positions:
        taken = f", of which {reserved} are taken by virtual tokens" if reserved else ""
        raise UsageError(
            f"spec.hyperparameters.maxLength is {max_length}, but the model has only {positions} positions{taken}",
            f"set maxLength to at most {positions - reserved}",
        )


def override_dropout(config: PretrainedConfig, probability: float | None) -> None:
    """Set every dropout probability of the configuration, in place.

    What leaves out whole blocks (stochastic depth, layerdrop) is another thing and stays. timm has one probability, of
    the dropout before the head (in VGG: within it), which its builder takes and no configuration shows.

    Raises:
        UsageError: the architecture has none, so the setting could only be ignored.
    """
    if probability is None:
        return
    if config.model_type == "timm_wrapper":
        config.model_args = {**(config.model_args or {}), "drop_rate": probability}
        return
    text = config.get_text_config()
    names = [name for name, value in vars(text).items() if DROPOUT.search(name) and _is_number(value)]
    if not names:
        raise UsageError(
            f"spec.hyperparameters.dropout: the architecture {config.model_type} has no dropout",
            "remove it; LoRA and QLoRA have strategy.lora.dropout",
        )
    for name in names:
        setattr(text, name, probability)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def load_tokenizer(folder: Path, spec: ModelSpec, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the weights.

    Raises:
        UsageError: it cannot be read, or knows more tokens than the model has embeddings.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise UsageError(
            f"{FIELD}: the tokenizer of {spec.uri} cannot be read: {type(error).__name__}: {error}",
            "put the files that the tokenizer's save_pretrained writes beside config.json",
        ) from error
    embeddings = config.get_text_config().vocab_size
    if len(tokenizer) > embeddings:
        raise UsageError(
            f"{FIELD}: the tokenizer of {spec.uri} has {len(tokenizer)} tokens, the model embeds only {embeddings}",
            "use the tokenizer that belongs to the model",
        )
    return tokenizer


@dataclass(frozen=True)
class Source:
    """Where a model lies, and how it is to be loaded.

    Attributes:
        config: the configuration that it shall have.
        dtype: in which the weights are held (those that are not quantised).
        attention: implementation by its name in transformers.
        quantization: a BitsAndBytesConfig, or None.
    """

    folder: Path
    spec: ModelSpec
    config: PretrainedConfig
    dtype: torch.dtype
    attention: str
    quantization: Any = None


class LoadedWeights(NamedTuple):
    """A model, and the names of the tensors that the library had to make up since the folder does not have them."""

    model: PreTrainedModel
    missing: list[str]


def load_weights(source: Source, loader: str) -> LoadedWeights:
    """The model with its weights, on the CPU (quantised on a GPU: there).

    Args:
        loader: name of the class in transformers, such as AutoModelForCausalLM. Tensors whose shape the configuration
            gives otherwise count as missing.

    Raises:
        UsageError: the weights are broken, or do not fit the configuration.
    """
    import transformers
    from safetensors import SafetensorError

    try:
        model, loaded = getattr(transformers, loader).from_pretrained(
            source.folder,
            config=source.config,
            dtype=source.dtype,
            attn_implementation=asked_attention(source.attention, source.spec.attention, source.config, loader),
            quantization_config=only_blocks(source, loader),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=source.spec.trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"{FIELD}: the weights of {source.spec.uri} cannot be loaded: {error}",
            "upload the model's folder again; perhaps a file is cut off, or config.json belongs to other weights",
        ) from error
    mismatched = [name for name, *_ in loaded["mismatched_keys"]]
    return LoadedWeights(model, sorted({*loaded["missing_keys"], *mismatched}))


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a 4-bit weight counts as the parameters that it stands for.

    Where only some elements of a tensor learn, these count.
    """
    trainable = total = 0
    for parameter in model.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None) or parameter.shape
        count = shape.numel()
        total += count
        trainable += getattr(parameter, "learning_elements", count) if parameter.requires_grad else 0
    return trainable, total


def size_in_words(parameters: int) -> str:
    """1234567 -> 1.2M."""
    if parameters < 1000:
        return str(parameters)
    power = min(int(math.log10(parameters) // 3), 4)
    return f"{parameters / 1000**power:.3g}{'_KMBT'[power]}"
