"""Strategies that add something to a frozen base, with heads on encoders and language models, from job to card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.metrics import log_loss, r2_score
from transformers import AutoModelForSequenceClassification

from tests.support.jobs import run
from tests.trainer.test_labeled_text import BODIES, Outcome, a_labeled_job, held_out, predictions

STRATEGIES: dict[str, dict[str, Any]] = {
    "Adapter": {},
    "PromptTuning": {"promptTuning": {"tokens": 4, "initText": "which letter"}, "rate": 3e-2},
    "PrefixTuning": {"prefixTuning": {"tokens": 4}, "rate": 3e-2},
    "IA3": {"rate": 3e-2},
    "Additive": {"additive": {"blocks": 1}},
}
PAIRS = [(strategy, body, kind) for strategy in STRATEGIES for body in BODIES for kind in ("classes", "numbers")]


@pytest.fixture(scope="module")
def outcome(request, tmp_path_factory, cache={}) -> Outcome:  # noqa: B006
    strategy, body, kind = request.param
    if request.param not in cache:
        root = tmp_path_factory.mktemp("-".join(request.param))
        BODIES[body](root / "model")
        options = dict(STRATEGIES[strategy])
        hyperparameters = {"learningRate": options.pop("rate", 1e-2)}
        job = a_labeled_job(
            root, strategy, kind, hyperparameters=hyperparameters, output={"merge": strategy == "IA3"}, **options
        )
        cache[request.param] = Outcome(root, kind, run(job, root / "scratch"))
    return cache[request.param]


def of(pairs):
    return pytest.mark.parametrize("outcome", pairs, indirect=True, ids="-".join)


@of(PAIRS)
def test_more_is_learned_than_the_plainest_guess_knows(outcome):
    assert outcome.result.metrics["eval_loss"] < 0.8 * outcome.result.baseline["eval_loss"]


# In plain PEFT padding stands between virtual tokens and text, and answers depend on it a little.
@of([pair for pair in PAIRS if pair[:2] not in (("PromptTuning", "llama"), ("PrefixTuning", "llama"))])
def test_what_the_code_in_the_card_loads_is_what_was_measured(outcome):
    logits, labels = predictions(outcome), [row["label"] for row in held_out(outcome.kind)]
    if outcome.kind == "numbers":
        assert outcome.result.metrics["eval_r2"] == pytest.approx(r2_score(labels, logits.squeeze(-1)), abs=1e-3)
    else:
        expected = log_loss(labels, logits.double().softmax(-1))
        assert outcome.result.metrics["eval_loss"] == pytest.approx(expected, rel=1e-3)


@of([pair for pair in PAIRS if pair[0] == "IA3"])
def test_merged_factors_answer_as_the_adapter_on_its_base(outcome):
    merged = AutoModelForSequenceClassification.from_pretrained(outcome.root / "out/model")
    assert torch.allclose(predictions(outcome, merged), predictions(outcome), atol=1e-4)
