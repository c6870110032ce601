"""Which tokens are learned: for every kind of template and tokenizer, the assistant's words and the ends of turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import llama3_chat_template, qwen3_chat_template

from finetune_trainer.data.conversations import Conversation
from finetune_trainer.data.encoding import IGNORED, Encoded
from finetune_trainer.data.masks import Masker, Supervised, rendered_sample
from finetune_trainer.data.problems import Problem
from finetune_trainer.data.templates import chat_template
from finetune_trainer.errors import UsageError
from tests.data import tokenizers
from tests.data.learned import encode, stretches

Make = Callable[[], PreTrainedTokenizerBase]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def learned(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[str]:
    """What is learned of a conversation, decoded stretch by stretch."""
    result = encode(tokenizer, {"messages": messages}, "messages")
    assert isinstance(result, Encoded), result
    return stretches(tokenizer, result)


FAMILIES: dict[str, tuple[Make, str, str]] = {
    "ChatML": (tokenizers.chatml, "", "<|im_end|>"),
    "marked": (lambda: tokenizers.chatml(tokenizers.MARKED), "", "<|im_end|>"),
    "marked without the end": (lambda: tokenizers.chatml(tokenizers.MARKED_WITHOUT_END), "", "<|im_end|>"),
    "like Llama 3": (tokenizers.llama_3, "", "<|eot_id|>"),
    "like Llama 2": (lambda: tokenizers.sentence_piece(tokenizers.LLAMA_2_LIKE), "", " </s>"),
    "default, byte level": (lambda: tokenizers.chatml(None), " ", "<|im_end|>"),
    "default, sentence pieces": (tokenizers.sentence_piece, "", "</s>"),
}
"""Tokenizer, and what its template puts before and after each answer, as the tokenizer decodes it."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_and_its_end_token_are_learned_and_nothing_else(family: str) -> None:
    make, before, after = FAMILIES[family]
    tokenizer = make()
    answers = ["one", "two words", "  indented\n\n    code\n", "🙂 ünïcödé 中文"]
    messages = turns("how?", answers[0], "why?", answers[1], "\n", answers[2], "x", answers[3])
    assert learned(tokenizer, messages) == [before + answer + after for answer in answers]


@pytest.mark.parametrize("family", FAMILIES)
def test_learned_tokens_follow_the_prompt_as_generation_will_see_it(family: str) -> None:
    tokenizer = FAMILIES[family][0]()
    messages = turns("how?", "like this", "why?", "because of that")
    result = encode(tokenizer, {"messages": messages}, "messages")
    assert isinstance(result, Encoded)
    ((ids, labels),) = result.parts
    first = int(np.flatnonzero(labels != IGNORED)[0])
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert ids[:first].tolist() == prompt


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], include_characters="\n\t"), max_size=60)
answers = texts.filter(str.strip)
# SmolLM2's vocabulary lacks some bytes, which are in no text that people write.
common = st.text(
    st.characters(max_codepoint=0x2FF, exclude_categories=["Cc"], include_characters="\n\t🙂🚀中文"), max_size=60
)
conversations = st.lists(st.tuples(texts, answers), min_size=1, max_size=5)


@pytest.mark.parametrize("family", ["ChatML", "marked", "like Llama 3"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=conversations)
def test_learned_tokens_decode_to_exactly_the_answers(
    family: str, pairs: list[tuple[str, str]], cached: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = cached.setdefault(family, FAMILIES[family][0]())
    expected = [answer + FAMILIES[family][2] for _, answer in pairs]
    assert learned(tokenizer, turns(*(text for pair in pairs for text in pair))) == expected


@pytest.fixture(scope="module")
def cached() -> dict[str, PreTrainedTokenizerBase]:
    return {}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(common, common.filter(str.strip)), min_size=1, max_size=5))
def test_learned_tokens_of_a_real_model_decode_to_exactly_the_answers(
    smollm2: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]
) -> None:
    expected = [answer + "<|im_end|>" for _, answer in pairs]
    assert learned(smollm2, turns(*(text for pair in pairs for text in pair))) == expected


@settings(max_examples=60, deadline=None)
@given(prompt=texts, completion=answers)
def test_of_a_completion_only_the_completion_and_the_end_are_learned(prompt: str, completion: str) -> None:
    tokenizer = LLAMA_3
    result = encode(tokenizer, {"prompt": prompt, "completion": completion}, "prompt-completion")
    assert isinstance(result, Encoded)
    assert stretches(tokenizer, result) == [completion + "<|end_of_text|>"]
    assert result.parts[0][0][0] == tokenizer.bos_token_id


LLAMA_3 = tokenizers.llama_3()


def test_of_a_text_all_is_learned_but_the_first_token_which_nothing_predicts() -> None:
    tokenizer = tokenizers.chatml()
    result = encode(tokenizer, {"text": "plain text"}, "text")
    assert isinstance(result, Encoded)
    ((ids, labels),) = result.parts
    assert tokenizer.decode(ids) == "plain text<|im_end|>"
    assert labels.tolist() == [IGNORED, *ids[1:].tolist()]


def test_a_bos_is_put_before_a_text_but_not_learned() -> None:
    result = encode(LLAMA_3, {"text": "plain text"}, "text")
    assert isinstance(result, Encoded)
    assert LLAMA_3.decode(result.parts[0][0]) == "<|begin_of_text|>plain text<|end_of_text|>"
    assert stretches(LLAMA_3, result) == ["plain text<|end_of_text|>"]


def test_a_prompt_of_messages_is_not_learned_even_where_the_assistant_speaks() -> None:
    for tokenizer in (tokenizers.chatml(), tokenizers.chatml(tokenizers.MARKED)):
        row = {"prompt": turns("how?", "so", "why?"), "completion": [{"role": "assistant", "content": "because"}]}
        result = encode(tokenizer, row, "prompt-completion")
        assert isinstance(result, Encoded)
        assert stretches(tokenizer, result) == ["because<|im_end|>"]


def test_tokenizers_that_throw_space_away_learn_the_words() -> None:
    tokenizer = tokenizers.words(tokenizers.CHATML)
    assert learned(tokenizer, turns("what?", "train data .", "no", "yes")) == [
        "train data . <|im_end|>",
        "yes <|im_end|>",
    ]


def test_marks_and_prefixes_find_the_same_answers() -> None:
    """For Llama 3, TRL's marked template is used; the method for unknown templates must agree with it."""
    tokenizer = tokenizers.byte_level(
        llama3_chat_template, tokenizers.LLAMA_TOKENS, eos="<|eot_id|>", bos="<|begin_of_text|>"
    )
    by_marks = chat_template(tokenizer)
    assert by_marks.source == "training"
    by_prefixes = replace(by_marks, text=llama3_chat_template, tool_text=llama3_chat_template)
    conversation = Conversation(turns("how?", "like this", "why?", "because"))
    assert by_marks.supervised(conversation) == by_prefixes.supervised(conversation)


def test_a_known_template_that_rewrites_turns_is_replaced_by_one_that_does_not() -> None:
    tokenizer = tokenizers.byte_level(qwen3_chat_template, [*tokenizers.CHATML_TOKENS, "<think>"], eos="<|im_end|>")
    found = learned(tokenizer, turns("how?", "so", "why?", "because"))
    assert [text.removesuffix("\n").endswith(("so<|im_end|>", "because<|im_end|>")) for text in found] == [True, True]
    assert tokenizer.chat_template == qwen3_chat_template, "the model is delivered with its own"


def test_an_unknown_template_that_rewrites_turns_is_refused_with_the_way_out() -> None:
    tokenizer = tokenizers.chatml(tokenizers.FORGETS_THOUGHTS)
    messages = turns("how?", "<think>hm</think>so", "why?", "because")
    result = encode(tokenizer, {"messages": messages}, "messages")
    assert isinstance(result, Problem)
    assert "rewrites turn 2" in result.reason
    assert "{% generation %}" in result.reason
    assert "one row" in result.reason
    assert learned(tokenizer, messages[:2]) == ["<think>hm</think>so<|im_end|>"], "the row for each answer is fine"


def test_a_conversation_that_the_template_refuses_says_why() -> None:
    tokenizer = tokenizers.sentence_piece(tokenizers.LLAMA_2_LIKE)
    result = encode(tokenizer, {"messages": [{"role": "system", "content": "x"}, *turns("how?", "so")]}, "messages")
    assert isinstance(result, Problem)
    assert result.reason.endswith("refuses this conversation: only user and assistant roles are supported")


def test_a_template_without_end_tokens_gets_one_at_the_last_answer_and_the_others_are_counted() -> None:
    tokenizer = tokenizers.chatml(tokenizers.WITHOUT_END)
    messages = turns("how?", "so", "why?", "because")
    assert learned(tokenizer, messages)[-1] == "because\n<|im_end|>"
    result = encode(tokenizer, {"messages": messages}, "messages")
    assert isinstance(result, Encoded)
    assert result.open_turns == 1


@pytest.mark.parametrize(
    ("make", "ends"),
    [
        (tokenizers.chatml, ("<|im_end|>",)),
        (tokenizers.llama_3, ("<|eot_id|>", "<|end_of_text|>")),
        (lambda: tokenizers.chatml(tokenizers.WITHOUT_END), ("<|im_end|>",)),
    ],
)
def test_the_tokens_that_end_a_turn_are_found(make: Make, ends: tuple[str, ...]) -> None:
    assert chat_template(make()).turn_ends == ends


def test_a_tokenizer_without_a_template_gets_the_default_one_with_its_bos() -> None:
    tokenizer = tokenizers.sentence_piece()
    assert chat_template(tokenizer).source == "default"
    text = tokenizer.apply_chat_template(turns("Hi", "Hello", "Bye", "See you"), tokenize=False)
    assert text == "<s>USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT: See you</s>"
    prompt = tokenizer.apply_chat_template(turns("Hi"), tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>USER: Hi ASSISTANT:"


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = tokenizers.chatml()
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no eos_token"):
        chat_template(tokenizer)


def test_a_cut_row_keeps_what_fits_and_says_how_much_was_lost() -> None:
    tokenizer = tokenizers.chatml()
    whole = encode(tokenizer, {"messages": turns("how?", "so", "why?", "because")}, "messages")
    assert isinstance(whole, Encoded)
    cut = encode(tokenizer, {"messages": turns("how?", "so", "why?", "because")}, "messages", whole.tokens - 2)
    assert isinstance(cut, Encoded)
    assert (len(cut.parts[0][0]), cut.tokens, cut.cut) == (whole.tokens - 2, whole.tokens, 2)
    assert stretches(tokenizer, cut)[0] == "so<|im_end|>"


def test_a_row_whose_answer_lies_beyond_max_length_teaches_nothing_and_says_so() -> None:
    result = encode(tokenizers.chatml(), {"messages": turns("a long question " * 20, "so")}, "messages", 32)
    assert isinstance(result, Problem)
    assert "beyond hyperparameters.maxLength 32, so it teaches nothing" in result.reason


def test_a_long_text_is_split_and_nothing_is_lost() -> None:
    tokenizer = tokenizers.chatml()
    text = "one two three four five six seven " * 20
    result = encode(tokenizer, {"text": text}, "text", 50)
    assert isinstance(result, Encoded)
    assert max(len(ids) for ids, _ in result.parts) == 50
    learned_ids = np.concatenate([labels[1:] for _, labels in result.parts])
    assert tokenizer.decode([*result.parts[0][0][:1], *learned_ids]) == text + "<|im_end|>"


def test_a_token_that_both_question_and_answer_share_is_taken_apart(smollm2: PreTrainedTokenizerBase) -> None:
    """A line break and the indent after it are one token to SmolLM2, of which the model could only be given all."""
    item = Supervised("say\n  x = 1", [(4, 11)], alone=False)
    ((ids, mask),) = Masker.of(smollm2)([item])
    assert smollm2.decode(ids[mask].tolist()) == "  x = 1"
    assert ids[~mask].tolist() == smollm2("say\n")["input_ids"]


def test_the_sample_shows_what_is_learned_in_brackets() -> None:
    tokenizer = tokenizers.chatml()
    ((ids, mask),) = Masker.of(tokenizer)([Supervised("what? yes", [(6, 9)], alone=False)])
    assert rendered_sample(tokenizer, ids, mask) == "what? [[yes]]"
