"""Chat templates: which one renders the conversations, and which characters of the result the assistant said.

Three ways lead to those characters. A template that marks them (`{% generation %}`) is believed. For templates of
known families without marks, TRL keeps marked versions. For every other template the conversation is rendered
up to each answer and again with it, and what was added is the answer; this holds only while the template renders
the beginning of a conversation the same whatever follows, which is checked for every turn.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from finetune_trainer.data.conversations import Conversation, Message
from finetune_trainer.data.problems import RowError
from finetune_trainer.errors import UsageError

Span = tuple[int, int]
"""Characters from the first to before the second."""

DEFAULT_TEMPLATE = Path(__file__).with_name("default_chat_template.jinja")
"""For tokenizers without a template: the dialogue that Vicuna v1.1 was trained on."""
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE, TOOL, CALL = "finetuneprobe", "finetunetool", "finetunecall"
"""Words that no template has of its own."""
PROBE_TOOL = {"type": "function", "function": {"name": TOOL, "description": "", "parameters": {"type": "object"}}}
# Some templates ask for an identifier of nine letters.
PROBE_CALL = {"id": "finetunes", "type": "function", "function": {"name": CALL, "arguments": {"name": "value"}}}
QUESTION = {"role": "user", "content": "question"}
ANSWER = {"role": "assistant", "content": PROBE}
CALLING = [
    QUESTION,
    {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]},
    {"role": "tool", "tool_call_id": "finetunes", "name": CALL, "content": "result"},
    ANSWER,
]
REFUSALS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
"""What a template raises on a conversation it was not written for."""


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations and finds the assistant's words in them. Can be pickled: workers get a copy.

    Attributes:
        text: the Jinja template; `tool_text` the one for conversations with tools.
        source: `tokenizer`, `training` (TRL's marked version) or `default`.
        variables: the special tokens that templates may name.
        turn_ends: the tokens that may end an assistant's turn.
        shows_tools, shows_calls: whether the tools on offer, and calls of them, are in what is rendered.
        text_arguments: whether the arguments of calls must be JSON text.
    """

    text: str
    tool_text: str
    source: str
    variables: dict[str, Any]
    turn_ends: tuple[str, ...] = ()
    shows_tools: bool = True
    shows_calls: bool = True
    text_arguments: bool = False

    def render(self, messages: list[Message], tools: list[Any] | None = None, prompt: bool = False) -> str:
        """As text; with `prompt`, up to where the assistant's next turn begins."""
        return self._run(messages, tools, add_generation_prompt=prompt)[0]

    def supervised(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The whole conversation as text, and what in it is learned: the assistant's turns with their end tokens.

        Raises:
            RowError: the template refuses the conversation, loses tools, or does not let the answers be found.
        """
        self._check_tools(conversation)
        marked = GENERATION_MARK.search(self.tool_text if conversation.tools else self.text)
        text, spans = self._marked(conversation) if marked else self._by_prefixes(conversation)
        if marked and conversation.learned_from:
            spans = self._after(conversation, text, spans)
        if not spans:
            raise RowError("the model's chat template marks nothing in this conversation as said by the assistant")
        return self._closed(text, spans)

    def unclosed(self, text: str, spans: list[Span]) -> int:
        """How many turns do not end with an end token, so that the model does not learn to stop there."""
        return sum(not text[:end].endswith(self.turn_ends) for _, end in spans)

    def _check_tools(self, conversation: Conversation) -> None:
        """Refuse what the template leaves out: a call that is not rendered would teach to say nothing."""
        calls = [call for message in conversation.messages for call in message.get("tool_calls", [])]
        for tools, shown, what, way_out in (
            (conversation.tools, self.shows_tools, "the tools on offer", "put them into the system message"),
            (calls, self.shows_calls, "calls of tools", "write them as text"),
        ):
            if tools and not shown:
                raise RowError(
                    f"the model's chat template leaves out {what} (here {tools[0]['function']['name']!r}); use a model "
                    f"whose template knows tools, or {way_out}"
                )

    def _run(self, messages: list[Message], tools: list[Any] | None, **options: Any) -> tuple[str, list[Span]]:
        template = self.tool_text if tools else self.text
        if self.text_arguments:
            messages = [_with_text_arguments(message) for message in messages]
        try:
            texts, spans = render_jinja_template(
                [messages], tools=tools, chat_template=template, **self.variables, **options
            )
        except REFUSALS as error:
            raise RowError(f"the model's chat template refuses this conversation: {error}") from error
        return texts[0], spans[0] if spans else []

    def _marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        text, spans = self._run(conversation.messages, conversation.tools, return_assistant_tokens_mask=True)
        return text, [span for span in spans if span[0] < span[1]]

    def _by_prefixes(self, conversation: Conversation) -> tuple[str, list[Span]]:
        messages, tools = conversation.messages, conversation.tools
        whole = self.render(messages, tools)
        spans = []
        for i in range(conversation.learned_from, len(messages)):
            if messages[i]["role"] != "assistant":
                continue
            before = self.render(messages[:i], tools, prompt=True)
            upto = self.render(messages[: i + 1], tools) if i + 1 < len(messages) else whole
            if not upto.startswith(before) or not whole.startswith(upto):
                raise RowError(_rewritten(i, before if not upto.startswith(before) else upto, whole))
            spans.append((len(before), len(upto)))
        return whole, spans

    def _after(self, conversation: Conversation, text: str, spans: list[Span]) -> list[Span]:
        prompt = self.render(conversation.messages[: conversation.learned_from], conversation.tools, prompt=True)
        learned_from = _common(prompt, text)
        return [span for span in spans if span[0] >= learned_from]

    def _closed(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """Make each turn end with its end token, and with nothing after it: generation stops there."""
        closed = [(start, self._turn_end(text, start, end)) for start, end in spans]
        start, end = closed[-1]
        if not text[:end].endswith(self.turn_ends) and not text[end:].strip():
            # Some templates leave the last turn open, so that the model would never learn to stop.
            text = text[:end] + self.turn_ends[0]
            closed[-1] = (start, len(text))
        return text, closed

    def _turn_end(self, text: str, start: int, end: int) -> int:
        said = text[start:end].rstrip()
        if said.endswith(self.turn_ends):
            return start + len(said)
        gap = len(text[end:]) - len(text[end:].lstrip())
        for mark in self.turn_ends:
            if text.startswith(mark, end + gap):
                return end + gap + len(mark)
        return end


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template that this tokenizer is trained with; one without any is given the default, which is then exported.

    Raises:
        UsageError: the tokenizer has no token that ends a text.
    """
    if tokenizer.eos_token is None:
        raise UsageError("model.uri: the tokenizer has no eos_token", "name it in tokenizer_config.json of the model")
    source = "tokenizer"
    if tokenizer.chat_template is None:
        beginning = "{{- bos_token }}" if _starts_with_bos(tokenizer) else ""
        tokenizer.chat_template = beginning + DEFAULT_TEMPLATE.read_text(encoding="utf-8")
        source = "default"
    training = _training_template(tokenizer, tokenizer.get_chat_template())
    if training:
        return _probed(ChatTemplate(training, training, "training", dict(tokenizer.special_tokens_map)), tokenizer)
    return own_template(tokenizer, source)


def own_template(tokenizer: PreTrainedTokenizerBase, source: str = "tokenizer") -> ChatTemplate:
    """The template that the tokenizer brings, as the model will be used with it."""
    text, tool_text = tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])
    return _probed(ChatTemplate(text, tool_text, source, dict(tokenizer.special_tokens_map)), tokenizer)


def _probed(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template with what a few renderings show of it."""
    template = replace(template, turn_ends=_turn_ends(template, tokenizer))
    offered = _rendered(template, [QUESTION, ANSWER], [PROBE_TOOL])
    # A template that refuses to render them refuses the rows too.
    template = replace(template, shows_tools=offered is None or TOOL in offered)
    for text_arguments in (False, True):
        candidate = replace(template, text_arguments=text_arguments)
        called = _rendered(candidate, CALLING, [PROBE_TOOL])
        if called is not None:
            return replace(candidate, shows_calls=CALL in called)
    return template


def _rendered(template: ChatTemplate, messages: list[Message], tools: list[Any] | None = None) -> str | None:
    try:
        return template.render(messages, tools)
    except RowError:
        return None


def _starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def _training_template(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    """TRL's version of a known template with marks; None where the template has marks, or is not known to TRL."""
    if GENERATION_MARK.search(text):
        return None
    # Here, not above: TRL brings torch and takes seconds, and workers have no use for it.
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)
    except (ValueError, *REFUSALS):
        return None


def _turn_ends(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What follows the assistant's words in this template, where that is one token, and the tokenizer's eos."""
    turns = [QUESTION, ANSWER]
    try:
        rendered = [template.render(turns), template.render(turns * 2)]
    except RowError:
        # A template for some other kind of conversation; the rows will tell.
        return (str(tokenizer.eos_token),)
    specials = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    found = []
    for text in rendered:
        for tail in text.split(PROBE)[1:]:
            found += [token for token in specials if tail.lstrip().startswith(token)][:1]
    return tuple(dict.fromkeys([*found, tokenizer.eos_token]))


def _with_text_arguments(message: Message) -> Message:
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", [])
    ]
    return message | {"tool_calls": calls} if calls else message


def _rewritten(turn: int, beginning: str, whole: str) -> str:
    same = _common(beginning, whole)
    return (
        f"the model's chat template rewrites turn {turn + 1} when turns follow it or it is complete (it renders "
        f"{beginning[same : same + 40]!r} alone, {whole[same : same + 40]!r} in the whole), so what the assistant said "
        "cannot be told apart; mark it in the template with {% generation %} ... {% endgeneration %}, or write one row "
        "for each answer"
    )


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
