"""The report as one HTML file without scripts and without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from finetune_trainer.report.facts import Report
from finetune_trainer.report.predictions import predictions
from finetune_trainer.report.svg import bar_chart, line_chart

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#1f2933}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #ddd;
vertical-align:top}pre{white-space:pre-wrap;background:#f5f7fa;padding:.6rem;border-radius:4px}
svg{width:100%;font-size:11px}figure{margin:1rem 0}.wide{overflow-x:auto}
"""


def page(report: Report) -> str:
    """The whole page."""
    result = report.result
    title = f"Fine-tuning {escape(result.job)}"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>",
        f"<h1>{title}</h1>",
        _table(_summary(report)),
        "<h2>Held-out rows, before and after</h2>" + _metrics(report) if result.metrics else "",
        predictions(report.evaluation),
        "<h2>Curves</h2>"
        + line_chart("Loss", {"training": report.curve("loss"), "held-out": report.curve("eval_loss")})
        + line_chart("Learning rate", {"learning rate": report.curve("learning_rate")}),
        "<h2>Fine-tuned angles</h2>" + _angles(report) if report.angles else "",
        "<h2>Answers to held-out prompts</h2>" + _samples(result.samples) if result.samples else "",
        "<h2>Data</h2>" + _tree(report.data),
        "<h2>Settings</h2>" + _tree(report.spec),
        "<h2>Versions</h2>" + _table(result.versions.items()),
    ]
    return "".join(parts)


def _summary(report: Report) -> list[tuple[str, Any]]:
    result = report.result
    return [
        ("Base model", report.spec["model"]["uri"]),
        ("Strategy", report.spec["strategy"]["type"]),
        ("Output", result.output.uri),
        ("Steps", f"{result.steps}{f', stopped early: {result.stopped_early}' if result.stopped_early else ''}"),
        ("Weights", f"of step {result.exported_step}"),
        ("Rows a step", f"{result.global_batch_size:,} over {result.world_size} process(es)"),
        *([("Tokens", f"{result.tokens:,}")] if result.tokens else []),
        ("Training time", f"{result.train_seconds:,.0f} s"),
        ("Trainable parameters", f"{result.trainable_parameters:,} of {result.total_parameters:,}"),
        *(("Warning", warning) for warning in report.warnings),
    ]


def _metrics(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}<td>{report.result.baseline.get(name, float('nan')):.4g}<td><b>{value:.4g}</b>"
        for name, value in sorted(report.result.metrics.items())
    )
    return f"<table><tr><th>Metric<th>{escape(report.baseline.capitalize())}<th>Tuned{rows}</table>"


def _angles(report: Report) -> str:
    kinds = dict.fromkeys(angle.kind for angle in report.angles)
    bars = {kind.value: [(a.layer, a.angle) for a in report.angles if a.kind is kind] for kind in kinds}
    text = (
        "<p>How far training has turned the weights of each block, in degrees. A large angle is what this task changed "
        "most; <code>strategy.select.angle</code> of another job picks by it.</p>"
    )
    return text + bar_chart("Angle in degrees by block", bars)


def _samples(samples: list[dict[str, str]]) -> str:
    return "".join(
        f"<table><tr><th>Prompt<td><pre>{escape(sample['prompt'])}</pre><tr><th>Expected<td><pre>"
        f"{escape(sample['reference'])}</pre><tr><th>Before<td><pre>{escape(sample['before'])}</pre><tr><th>After<td>"
        f"<pre>{escape(sample['after'])}</pre></table>"
        for sample in samples
    )


def _tree(value: Any) -> str:
    if isinstance(value, dict):
        return _table(value.items(), _tree)
    if isinstance(value, list):
        return "<br>".join(_tree(item) for item in value)
    text = escape(str(value))
    if text.startswith("data:image/"):
        return f'<img src="{text}" alt="">'
    return f"<pre>{text}</pre>" if "\n" in text else text


def _table(rows: Iterable[tuple[str, Any]], cell: Any = lambda value: escape(str(value))) -> str:
    return "<table>" + "".join(f"<tr><th>{escape(str(name))}<td>{cell(value)}" for name, value in rows) + "</table>"
