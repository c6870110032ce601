"""Features that come later."""

from __future__ import annotations

from tests.api.refusals.refusal import not_yet, only

UNSUPPORTED = (
    only(
        "spec.task.type",
        "Evaluation",
        "task type",
        "Instruction, CausalLM, SequenceClassification, Regression, ImageClassification",
    ),
    only(
        "spec.dataset.format",
        "preference",
        "format",
        "auto, messages, sharegpt, alpaca, prompt-completion, text, labeled, image-folder",
    ),
    only(
        "spec.evaluation.metrics[0]",
        "rouge",
        "metric",
        "perplexity, accuracy, precision, recall, f1, mse, mae, r2",
    ),
    not_yet("spec.model.adapter", {"uri": "s3://a/b"}, "merge the adapter into the model and name that"),
    not_yet("spec.dataset.preparation", {"deduplicate": True}, "prepare the data before the job"),
    not_yet("spec.tracking", {}, "remove it"),
)
