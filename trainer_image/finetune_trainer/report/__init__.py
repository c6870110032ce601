"""The report of a run: report.json, a page for people, and the model card."""

from finetune_trainer.report.card import card
from finetune_trainer.report.facts import Report
from finetune_trainer.report.page import page

__all__ = ["Report", "card", "page"]
