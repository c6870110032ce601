"""Documents in a pack do not see each other: shown by numbers, on real models and in a real training step."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetune_trainer.data import packs as packs_module
from finetune_trainer.data.encoding import IGNORED
from finetune_trainer.data.packing import PackedCollator, collator, sft_arguments, verify_isolation
from finetune_trainer.data.packs import best_fit, pack
from finetune_trainer.errors import UsageError
from tests.support.models import byte_tokenizer, tiny_llama_config

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "Llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "Gemma": (GemmaForCausalLM, GemmaConfig(**SIZES, head_dim=8)),
    "Mistral, sliding window": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=4)),
}
DOCUMENTS = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [17, 18, 19]]


def model_of(name: str, attention: str) -> PreTrainedModel:
    kind, config = MODELS[name]
    torch.manual_seed(0)
    return kind._from_config(config, attn_implementation=attention).eval()


def pack_of(documents: list[list[int]]) -> dict[str, Any]:
    ids = [token for document in documents for token in document]
    return {"input_ids": ids, "labels": ids, "seq_lengths": [len(document) for document in documents]}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_document_of_a_pack_gets_the_logits_that_it_gets_alone(name: str, attention: str) -> None:
    model = model_of(name, attention)
    batch = PackedCollator(0)([pack_of(DOCUMENTS), pack_of(DOCUMENTS[:1]), pack_of([DOCUMENTS[2], DOCUMENTS[1]])])
    del batch["labels"]
    logits = model(**batch).logits
    placed = [(0, 0, 0), (0, 7, 1), (0, 16, 2), (1, 0, 0), (2, 0, 2), (2, 3, 1)]
    for row, start, document in placed:
        alone = model(torch.tensor([DOCUMENTS[document]])).logits[0]
        torch.testing.assert_close(logits[row, start : start + len(alone)], alone, rtol=1e-5, atol=1e-6)
    assert logits.isfinite().all(), "padding sees at least itself"


@torch.no_grad()
def test_the_layout_for_flash_attention_isolates_too_where_it_can_be_tried() -> None:
    """TRL's one-row layout, here on sdpa: without a cache, as SFTTrainer runs it."""
    model = model_of("Llama", "sdpa")
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([pack_of(DOCUMENTS)])
    del batch["labels"]
    logits = model(**batch, use_cache=False).logits[0]
    alone = model(torch.tensor([DOCUMENTS[1]])).logits[0]
    torch.testing.assert_close(logits[7:16], alone, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_with_a_cache_documents_would_leak_so_the_collator_forbids_it() -> None:
    model = model_of("Llama", "sdpa")
    batch = PackedCollator(0)([pack_of(DOCUMENTS)])
    del batch["labels"]
    assert batch["use_cache"] is False
    leaking = model(**batch | {"use_cache": True}).logits[0, 7:16]
    assert not torch.allclose(leaking, model(**batch).logits[0, 7:16], atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_models_of_attention_pass_the_check(name: str) -> None:
    model = model_of(name, "sdpa").train()
    verify_isolation(model)
    assert model.training


def test_a_model_that_carries_state_along_is_refused_for_packing() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(UsageError, match=r"hyperparameters\.packing: MambaForCausalLM carries state") as refusal:
        verify_isolation(model)
    assert refusal.value.advice == "set hyperparameters.packing to false"


def dataset_of(rows: list[list[int]]) -> Dataset:
    labels = [[IGNORED, *row[1:]] for row in rows]
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(2, 16), min_size=1, max_size=40))
def test_packs_hold_every_row_once_and_none_is_longer_than_max_length(
    lengths: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [[100 * i + k for k in range(length)] for i, length in enumerate(lengths)]
    packs = pack(dataset_of(rows), 16, tmp_path_factory.mktemp("packs") / "packs.arrow")
    found = []
    for item in packs:
        assert len(item["input_ids"]) == sum(item["seq_lengths"]) <= 16
        cuts = np.cumsum([0, *item["seq_lengths"]])
        for start, end in pairwise(cuts):
            found.append(item["input_ids"][start:end])
            assert item["labels"][start] == IGNORED, "what precedes it is another document"
    assert sorted(found) == rows


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200), capacity=st.integers(50, 120))
def test_rows_are_packed_as_tightly_as_trl_packs_them(lengths: list[int], capacity: int) -> None:
    packs = best_fit(np.asarray(lengths, dtype=np.int32), capacity)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    assert max(sum(lengths[row] for row in rows) for rows in packs) <= capacity
    theirs = pack_dataset(Dataset.from_dict({"input_ids": [[7] * length for length in lengths]}), capacity, "bfd")
    assert len(packs) == len(theirs)


def test_packing_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs_module, "BIN_TOKENS", 40)
    told: list[int] = []
    rows = [[7] * 8 for _ in range(20)]
    assert len(pack(dataset_of(rows), 16, tmp_path / "packs.arrow", told.append)) > 9
    assert told == [5, 10, 15, 20]


def losses(rows: list[list[int]], packed: bool, folder: Path, batch: int) -> list[float]:
    """Losses of two real steps of SFTTrainer on these rows, all of them in each step."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(tiny_llama_config(), attn_implementation="sdpa")
    tokenizer = byte_tokenizer()
    dataset = dataset_of(rows)
    if packed:
        dataset = pack(dataset, 32, folder / "packs.arrow")
        assert 1 < len(dataset) < len(rows)
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(dataset) if packed else batch,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=False,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        **sft_arguments(packed, "sdpa"),
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=collator(packed, "sdpa", tokenizer),
    )
    assert list(trainer.train_dataset[0]) == list(dataset[0]), "nothing is prepared a second time"
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_training_on_packs_takes_the_same_steps_as_training_on_rows(tmp_path: Path) -> None:
    rows = [[10 + (7 * i + k * k) % 200 for k in range(4 + 3 * i)] for i in range(8)]
    assert losses(rows, True, tmp_path, 8) == pytest.approx(losses(rows, False, tmp_path, 8), rel=1e-4)
