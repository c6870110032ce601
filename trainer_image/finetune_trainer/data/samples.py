"""Held-out prompts with the expected answers, for a look at the model before and after."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from finetune_trainer.data.conversations import Conversation, Message
from finetune_trainer.data.formats import Canonical, Completion
from finetune_trainer.data.masks import lead_ids
from finetune_trainer.data.problems import RowError
from finetune_trainer.data.templates import ChatTemplate, own_template

TEXT_CHARACTERS = 200
"""Of a plain text at most so much is given, and twice as much is expected."""


@dataclass(frozen=True)
class Sample:
    """A prompt as people read it and as token ids that generation starts from, and the answer in the data."""

    prompt: str
    reference: str
    input_ids: list[int]


def samples_of(
    rows: Iterable[Canonical], tokenizer: PreTrainedTokenizerBase, count: int, max_length: int
) -> list[Sample]:
    """Samples of the first rows whose prompts leave room for an answer within max_length."""
    found: list[Sample] = []
    # By the tokenizer's own template, as the model will be used, not by a version of it made for training.
    template = own_template(tokenizer) if tokenizer.chat_template else None
    for row in rows:
        if len(found) == count:
            break
        sample = _sample(row, tokenizer, template)
        if sample and len(sample.input_ids) < max_length:
            found.append(sample)
    return found


def _sample(row: Canonical, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None) -> Sample | None:
    if isinstance(row, Conversation):
        assert template is not None, "a tokenizer without a template has been given one"
        return _of_conversation(row, tokenizer, template)
    if isinstance(row, Completion):
        return Sample(row.prompt, row.completion, _alone(row.prompt, tokenizer))
    cut = min(len(row.text) // 2, TEXT_CHARACTERS)
    return Sample(row.text[:cut], row.text[cut : 3 * cut], _alone(row.text[:cut], tokenizer))


def _of_conversation(row: Conversation, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> Sample | None:
    """The last answer in words, or the last call, after all that was said before it."""
    answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    last = next((i for i in reversed(answers) if row.messages[i]["content"].strip()), answers[-1])
    try:
        prompt = template.render(row.messages[:last], row.tools, prompt=True)
    except RowError:
        # The version for training took the row; the model's own does not.
        return None
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return Sample(_said(row.messages[last - 1]), _said(row.messages[last]), ids)


def _said(message: Message) -> str:
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return str(message["content"]) or json.dumps(calls, ensure_ascii=False)


def _alone(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [*lead_ids(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]
