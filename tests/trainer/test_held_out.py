"""The held-out loss is the mean over trained tokens, whatever the batches are."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_api.contract import Stage
from tests.support.jobs import a_job, a_session, write_rows

ROWS = [{"messages": [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y" * (1 + n * n)}]}
        for n in range(1, 8)]  # fmt: skip


def uneven(root, **values):
    write_rows(root / "held-out.jsonl", ROWS)
    validation = {"validation": {"uri": f"file://{root / 'held-out.jsonl'}"}}
    return a_session(a_job(root, dataset=validation, hyperparameters=values), root / str(len(values)))


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_every_trained_token_counts_the_same(tmp_path, batch):
    session = uneven(tmp_path, evalBatchSize=batch)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loss = tokens = 0.0
    for row in session.prepared.validation:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        loss += torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum").item()
        tokens += (labels[0, 1:] != -100).sum().item()
    found = session.trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)


def test_packed_rows_have_the_loss_of_single_rows(tmp_path):
    single, packed = uneven(tmp_path), uneven(tmp_path, packing=True)
    assert len(packed.prepared.validation) < len(single.prepared.validation)
    assert packed.trainer.evaluate()["eval_loss"] == pytest.approx(single.trainer.evaluate()["eval_loss"], rel=1e-5)


def test_an_evaluation_moves_no_weight_and_switches_back_to_training(tmp_path):
    session = uneven(tmp_path)
    model = session.trainer.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    session.trainer.evaluate()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    session.trainer.train()
    assert session.trainer.state.global_step == 6


def test_stages_are_told_in_the_order_of_the_contract(tmp_path):
    assert list(Stage).index(Stage.EVALUATING) < list(Stage).index(Stage.EXPORTING)
