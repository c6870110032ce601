"""Dataset formats: each is a pure function from a row to what is learned from it, and refuses what it cannot use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from finetune_api.job import TaskType
from finetune_trainer.data.conversations import (
    Conversation,
    check_order,
    openai_messages,
    sharegpt_messages,
    tools_of,
    turns_in,
)
from finetune_trainer.data.problems import RowError, shorten
from finetune_trainer.data.values import filled, listed, text_of
from finetune_trainer.errors import DataError


@dataclass(frozen=True)
class Completion:
    """A text and its continuation; only the continuation is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A text that is learned whole."""

    text: str


@dataclass(frozen=True)
class Labeled:
    """A text, or two, and what is to be said of it: `label` as it stands in the row."""

    text: str
    pair: str | None
    label: Any


Canonical = Conversation | Completion | Text | Labeled


@dataclass(frozen=True)
class Format:
    """How rows of one format look, and how they are read.

    Attributes:
        fields: the format in the words of an error message.
        reads: names of all the fields that `read` looks at; those that may be missing, too.
    """

    name: str
    fields: str
    reads: tuple[str, ...]
    tasks: tuple[TaskType, ...]
    fits: Callable[[dict[str, Any]], bool]
    read: Callable[[dict[str, Any]], Canonical]


def messages(row: dict[str, Any]) -> Conversation:
    """OpenAI's chat format: `messages` with role and content, `tools` and tool_calls kept."""
    field = "conversations" if "conversations" in row and "messages" not in row else "messages"
    conversation = Conversation(openai_messages(row, field), tools_of(row))
    check_order(conversation.messages, field)
    return conversation


def sharegpt(row: dict[str, Any]) -> Conversation:
    """ShareGPT and Vicuna: `conversations` with from and value, perhaps `system` and `tools` beside it."""
    turns = sharegpt_messages(row, "conversations")
    if filled(row.get("system")):
        turns = [{"role": "system", "content": text_of(row, "system")}, *turns]
    check_order(turns, "conversations")
    return Conversation(turns, tools_of(row))


def alpaca(row: dict[str, Any]) -> Conversation:
    """Stanford Alpaca: `instruction`, perhaps `input` and `system`, and `output` as one question and answer."""
    question = _needed(row, "instruction")
    if filled(row.get("input")):
        question = f"{question}\n\n{text_of(row, 'input')}"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": _needed(row, "output")}]
    if filled(row.get("system")):
        turns = [{"role": "system", "content": text_of(row, "system")}, *turns]
    return Conversation(turns)


def prompt_completion(row: dict[str, Any]) -> Conversation | Completion:
    """`prompt` and `completion`, both plain text or both lists of messages; only the completion is learned."""
    if isinstance(listed(row.get("prompt")), list):
        prompt, completion = openai_messages(row, "prompt"), openai_messages(row, "completion")
        turns = prompt + completion
        check_order(turns, "prompt and completion", learned_from=len(prompt))
        return Conversation(turns, tools_of(row), learned_from=len(prompt))
    return Completion(text_of(row, "prompt"), _needed(row, "completion"))


def text(row: dict[str, Any]) -> Text:
    """`text`, learned whole."""
    return Text(_needed(row, "text"))


def labeled(row: dict[str, Any]) -> Labeled:
    """`text`, perhaps `textPair`, and `label`."""
    content = _needed(row, "text")
    pair = _needed(row, "textPair") if "textPair" in row else None
    if "label" not in row:
        raise RowError(f"label is missing; the fields here are {', '.join(map(str, row))}")
    return Labeled(content, pair, row["label"])


CHAT_TASKS = (TaskType.INSTRUCTION,)
TEXT_TASKS = (TaskType.CAUSAL_LM,)
LABEL_TASKS = (TaskType.SEQUENCE_CLASSIFICATION, TaskType.REGRESSION)
FORMATS: dict[str, Format] = {
    item.name: item
    for item in (
        Format(
            "messages",
            'messages: [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
            ("messages", "conversations", "tools"),
            CHAT_TASKS,
            lambda row: turns_in(row, "messages", "role") or turns_in(row, "conversations", "role"),
            messages,
        ),
        Format(
            "sharegpt",
            'conversations: [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]',
            ("conversations", "system", "tools"),
            CHAT_TASKS,
            lambda row: turns_in(row, "conversations", "from"),
            sharegpt,
        ),
        Format(
            "alpaca",
            "instruction, input, output",
            ("instruction", "input", "output", "system"),
            CHAT_TASKS,
            lambda row: {"instruction", "output"} <= set(row),
            alpaca,
        ),
        Format(
            "prompt-completion",
            "prompt, completion",
            ("prompt", "completion", "tools"),
            CHAT_TASKS,
            lambda row: {"prompt", "completion"} <= set(row),
            prompt_completion,
        ),
        Format(
            "labeled",
            "text, perhaps textPair, and label",
            ("text", "textPair", "label"),
            LABEL_TASKS,
            lambda row: {"text", "label"} <= set(row),
            labeled,
        ),
        Format("text", "text", ("text",), TEXT_TASKS, lambda row: "text" in row, text),
    )
}
"""In the order in which they are tried: a row of Alpaca often has a rendered `text` too."""


def detect(rows: Iterable[dict[str, Any]], task: TaskType, file: str) -> Format:
    """The format of a dataset from its first rows.

    Args:
        rows: the first rows that could be parsed.
        task: what is to be learned; formats that it cannot learn from do not count.
        file: the name of the file they come from, for the error.

    Raises:
        DataError: no row fits a format of this task; says what was found and what is known.
    """
    first = list(rows)
    for row in first:
        for item in FORMATS.values():
            if task in item.tasks and item.fits(row):
                return item
    known = "; ".join(f"{item.name} ({item.fields})" for item in FORMATS.values() if task in item.tasks)
    raise DataError(
        f"{file}: the format of the dataset is not known: {_found(first)}. Task {task.value} learns from {known}",
        _way_out(first, task),
    )


def _found(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "none of its first rows can be read"
    fields = ", ".join(str(name) for name in rows[0]) or "no fields"
    return f"its first row has {shorten(fields, 200)}"


def _way_out(rows: list[dict[str, Any]], task: TaskType) -> str:
    if task in LABEL_TASKS and rows:
        return "say in dataset.columns what the data calls them, such as {text: review, label: stars}"
    for item in FORMATS.values():
        if task not in item.tasks and any(item.fits(row) for row in rows):
            return f"the rows look like {item.name}: set task.type to {item.tasks[0].value}"
    return "rename the fields, or set dataset.format to see why a row does not fit it"


def _needed(row: dict[str, Any], field: str) -> str:
    value = text_of(row, field)
    if not value.strip():
        raise RowError(f"{field} is empty, so there is nothing to learn")
    return value
