"""Refused for how it learns and how it is measured."""

from __future__ import annotations

from tests.api.refusals.refusal import A_GPU, HYPER, Refusal

HELD_OUT = {"spec.dataset.validation": {"fraction": 0.1}}
EVALUATED = {**HELD_OUT, "spec.evaluation.everySteps": 10}
MEASURES = (
    (("Instruction", "CausalLM"), ("perplexity",), "accuracy"),
    (("SequenceClassification", "ImageClassification"), ("accuracy", "precision", "recall", "f1"), "r2"),
    (("Regression",), ("mse", "mae", "r2"), "perplexity"),
)
"""Tasks, what they are measured by, and a measure of others."""


def _measured(task: str, tasks: tuple[str, ...], metrics: tuple[str, ...], other: str) -> tuple[Refusal, Refusal]:
    names, watched = " and ".join(tasks), ", ".join(f"eval_{metric}" for metric in metrics)
    return (
        Refusal(
            f"{other} of {task}",
            {"spec.task.type": task, "spec.evaluation.metrics": [metrics[0], other]},
            f"spec.evaluation.metrics: Forbidden: {names} can be measured by {', '.join(metrics)}; remove the others",
        ),
        Refusal(
            f"stopping {task} by {other}",
            {**EVALUATED, "spec.task.type": task, "spec.evaluation.earlyStopping.metric": f"eval_{other}"},
            f"spec.evaluation.earlyStopping.metric: Forbidden: {names} can be stopped by eval_loss, {watched}; set one "
            "of these",
        ),
    )


BY_RULE = (
    Refusal(
        "evaluation without held-out rows",
        {"spec.evaluation.everySteps": 10},
        "spec.evaluation.everySteps: Forbidden: evaluation.everySteps needs held-out rows; set dataset.validation",
    ),
    Refusal(
        "float16 on the CPU",
        {"spec.model.dtype": "float16"},
        "spec.model.dtype: Forbidden: float16 needs a GPU; set model.dtype to auto (float32 on a CPU) or bfloat16, or "
        "resources.gpusPerNode",
    ),
    Refusal(
        "flash attention in float32",
        {"spec.model.attention": "flash_attention_2", "spec.model.dtype": "float32", **A_GPU},
        "spec.model.attention: Forbidden: flash_attention_2 needs a GPU and bfloat16 or float16; set model.attention "
        "to auto",
    ),
    Refusal(
        "paging without a GPU",
        {f"{HYPER}.optimizer": "pagedAdamw8bit"},
        f"{HYPER}.optimizer: Forbidden: pagedAdamw8bit pages GPU memory and needs a GPU; set optimizer to adamw8bit "
        "(works on CPUs) or adamw",
    ),
    Refusal(
        "packs of eight tokens",
        {f"{HYPER}.packing": True, f"{HYPER}.maxLength": 8},
        f"{HYPER}.packing: Forbidden: packing needs a maxLength of at least 16; raise maxLength or set packing: false",
    ),
    Refusal(
        "a warm-up to a constant",
        {f"{HYPER}.scheduler": "constant", f"{HYPER}.warmupSteps": 10},
        f"{HYPER}.warmupSteps: Forbidden: the scheduler constant has no warm-up; set scheduler to constantWithWarmup, "
        "or remove warmupSteps",
    ),
    Refusal(
        "betas without Adam",
        {f"{HYPER}.optimizer": "sgd", f"{HYPER}.beta1": 0.8},
        f"{HYPER}.optimizer: Forbidden: beta1, beta2 and epsilon belong to the adamw optimizers; remove them, or set "
        "optimizer to adamw",
    ),
    *(
        Refusal(
            f"packing for {task}",
            {"spec.task.type": task, f"{HYPER}.packing": True},
            f"{HYPER}.packing: Forbidden: packing belongs to the tasks Instruction and CausalLM: a classifier answers "
            "once for each row; set it to false",
        )
        for task in ("SequenceClassification", "Regression", "ImageClassification")
    ),
    *(
        Refusal(
            f"smoothing of {name}",
            {"spec.task": task, f"{HYPER}.labelSmoothing": 0.1},
            f"{HYPER}.labelSmoothing: Forbidden: labelSmoothing spreads the probability of one class over all, and "
            "neither numbers nor several labels have one; remove it",
        )
        for name, task in (
            ("numbers", {"type": "Regression"}),
            ("several labels", {"type": "SequenceClassification", "multiLabel": True}),
        )
    ),
    Refusal(
        "noise on words of an image",
        {"spec.task.type": "ImageClassification", f"{HYPER}.neftuneAlpha": 5},
        f"{HYPER}.neftuneAlpha: Forbidden: neftuneAlpha is noise on the embeddings of words, and images have none; "
        "remove it",
    ),
    Refusal(
        "a rate for no part",
        {f"{HYPER}.learningRateGroups": [{"select": {}, "learningRate": 0.1}]},
        f"{HYPER}.learningRateGroups[0].select: Invalid value: set layers, modules, or both",
    ),
    Refusal(
        "stopping without evaluations",
        {**HELD_OUT, "spec.evaluation.earlyStopping": {}},
        "spec.evaluation.earlyStopping: Forbidden: evaluation.earlyStopping needs evaluations while training; set "
        "evaluation.everySteps",
    ),
    Refusal(
        "the best of one step",
        {**HELD_OUT, "spec.output.weights": "Best"},
        "spec.output.weights: Forbidden: without evaluations while training no step is known to be the best; set "
        "evaluation.everySteps, or output.weights to Last",
    ),
    Refusal(
        "stopping by what nobody knows",
        {**EVALUATED, "spec.evaluation.earlyStopping.metric": "eval_luck"},
        'spec.evaluation.earlyStopping.metric: Invalid value: "eval_luck": must be one of eval_loss, eval_perplexity, '
        "eval_accuracy, eval_precision, eval_recall, eval_f1, eval_mse, eval_mae, eval_r2",
    ),
    Refusal(
        "stopping by what is not measured",
        {
            **EVALUATED,
            "spec.task.type": "SequenceClassification",
            "spec.evaluation.metrics": ["accuracy"],
            "spec.evaluation.earlyStopping.metric": "eval_f1",
        },
        "spec.evaluation.earlyStopping.metric: Forbidden: earlyStopping.metric is not among evaluation.metrics, so "
        "that it would not be measured; add it there, or remove evaluation.metrics",
    ),
    *(
        refusal
        for tasks, metrics, other in MEASURES
        for task in tasks
        for refusal in _measured(task, tasks, metrics, other)
    ),
)
