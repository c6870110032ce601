"""Held-out prompts with the expected answers, for a look at the model before and after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from finetune_trainer.data.conversations import Conversation
from finetune_trainer.data.formats import Canonical, Completion
from finetune_trainer.data.masks import lead_ids

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
    for row in rows:
        if len(found) == count:
            break
        sample = _sample(row, tokenizer)
        if len(sample.input_ids) < max_length:
            found.append(sample)
    return found


def _sample(row: Canonical, tokenizer: PreTrainedTokenizerBase) -> Sample:
    if isinstance(row, Conversation):
        return _of_conversation(row, tokenizer)
    if isinstance(row, Completion):
        return Sample(row.prompt, row.completion, _alone(row.prompt, tokenizer))
    cut = min(len(row.text) // 2, TEXT_CHARACTERS)
    return Sample(row.text[:cut], row.text[cut : 3 * cut], _alone(row.text[:cut], tokenizer))


def _of_conversation(row: Conversation, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """The last answer in words, after all that was said before it."""
    answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    last = next((i for i in reversed(answers) if _words(row, i).strip()), answers[-1])
    # By the tokenizer's own template, as the model will be used, not by a version of it made for training.
    ids = tokenizer.apply_chat_template(
        row.messages[:last], tools=row.tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return Sample(_words(row, last - 1), _words(row, last), ids)


def _words(row: Conversation, index: int) -> str:
    return str(row.messages[index].get("content", ""))


def _alone(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [*lead_ids(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]
