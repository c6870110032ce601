"""Conversations with tools: the ways they are written, what of them is learned, and templates that do not know them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trl

from finetune_trainer.data.conversations import tools_of
from finetune_trainer.data.encoding import Encoded
from finetune_trainer.data.formats import messages, sharegpt
from finetune_trainer.data.problems import Problem, RowError
from finetune_trainer.data.samples import samples_of
from finetune_trainer.data.templates import chat_template
from tests.data import tokenizers
from tests.data.learned import encode, stretches

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
"""Of real models, unchanged."""
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
ASK = {"role": "user", "content": "Rain?"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": '{"rain": false}'}
ANSWER = {"role": "assistant", "content": "It is dry."}
ROW = {"messages": [ASK, CALLING, RESULT, ANSWER], "tools": [TOOL]}


def of_family(name: str) -> Any:
    specials = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<think>"]
    text = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizers.byte_level(text, specials, eos="<|im_end|>", bos="<|begin_of_text|>")


def learned(tokenizer: Any, row: dict[str, Any], row_format: str = "messages") -> list[str]:
    result = encode(tokenizer, row, row_format)
    assert isinstance(result, Encoded), result
    return stretches(tokenizer, result)


def test_calls_are_learned_with_their_arguments_and_results_are_not() -> None:
    assert learned(tokenizers.chatml(tokenizers.KNOWS_TOOLS), ROW) == [
        '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call><|im_end|>',
        "It is dry.<|im_end|>",
    ]


FAMILIES = {
    "qwen2_5": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
    "qwen3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
    "llama3_1": '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>',
    "glm4moe": "<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>",
    "gptoss": '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>',
    "lfm2_v2": "<|tool_call_start|>[weather(city='Rome')]<|tool_call_end|><|im_end|>",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_of_real_models_learn_the_call_and_the_answer(family: str) -> None:
    call, answer = learned(of_family(family), ROW)
    assert FAMILIES[family] in call
    assert "It is dry." in answer
    assert "Rain?" not in call + answer
    assert '"rain": false' not in call + answer


WAYS: dict[str, list[dict[str, Any]]] = {
    "arguments as JSON text": [ASK, CALLING, RESULT, ANSWER],
    "arguments as an object": [
        ASK,
        {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}]},
        RESULT,
        ANSWER,
    ],
    "a bare call": [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]},
        RESULT,
        ANSWER,
    ],
    "OpenAI's older way": [
        ASK,
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function", "name": "weather", "content": '{"rain": false}'},
        ANSWER,
    ],
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_write_a_call_in_messages_teach_the_same(way: str) -> None:
    tokenizer = tokenizers.chatml(tokenizers.KNOWS_TOOLS)
    assert learned(tokenizer, {"messages": WAYS[way], "tools": [TOOL]}) == learned(tokenizer, ROW)


@pytest.mark.parametrize("caller", ["function_call", "function-call", "tool_call"])
@pytest.mark.parametrize("responder", ["observation", "tool", "function", "function_response", "tool_response"])
def test_calls_and_observations_of_sharegpt_teach_the_same(caller: str, responder: str) -> None:
    value = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
    said = [("human", "Rain?"), (caller, value), (responder, '{"rain": false}'), ("gpt", "It is dry.")]
    row = {
        "conversations": [{"from": who, "value": what} for who, what in said],
        # As LLaMA-Factory writes them: bare, and as text.
        "tools": json.dumps([TOOL["function"]]),
    }
    tokenizer = tokenizers.chatml(tokenizers.KNOWS_TOOLS)
    assert learned(tokenizer, row, "sharegpt") == learned(tokenizer, ROW)


def test_words_and_calls_in_a_row_are_one_turn_of_the_assistant() -> None:
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    said: list[tuple[str, Any]] = [
        ("human", "Rain?"),
        ("gpt", "Let me see."),
        ("function_call", json.dumps(call)),
        ("function_call", json.dumps([call, call])),
        ("observation", "no"),
        ("gpt", "It is dry."),
    ]
    read = sharegpt({"conversations": [{"from": who, "value": what} for who, what in said]})
    assert [message["role"] for message in read.messages] == ["user", "assistant", "tool", "assistant"]
    assert read.messages[1]["content"] == "Let me see."
    assert read.messages[1]["tool_calls"] == [{"type": "function", "function": call}] * 3


@pytest.mark.parametrize("value", ["", "<functioncall> weather", "[]", "7"])
def test_a_call_of_sharegpt_that_is_no_json_says_how_it_is_written(value: str) -> None:
    turns = [{"from": "human", "value": "Rain?"}, {"from": "function_call", "value": value}]
    with pytest.raises(RowError, match=r"conversations\[1\]\.value is no call of a tool; it must be JSON such as"):
        sharegpt({"conversations": turns})


def test_tools_are_given_to_templates_in_openai_s_form() -> None:
    assert tools_of({"tools": [TOOL["function"]]}) == [TOOL]
    assert tools_of({"tools": [TOOL]}) == [TOOL]
    assert tools_of({"tools": json.dumps([{"function": TOOL["function"]}])}) == [TOOL]
    with pytest.raises(RowError, match=r"tools\[0\]\.name is null; it must be a string"):
        tools_of({"tools": [{"description": "nameless"}]})


def test_a_call_without_a_name_is_refused() -> None:
    calling = {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}
    with pytest.raises(RowError, match=r"messages\[1\]\.tool_calls\[0\]\.name is null"):
        messages({"messages": [ASK, calling]})


def reason(tokenizer: Any, row: dict[str, Any]) -> str:
    result = encode(tokenizer, row, "messages")
    assert isinstance(result, Problem), result
    return result.reason


def test_calls_that_a_template_leaves_out_are_refused_since_silence_would_be_learned() -> None:
    refusal = reason(tokenizers.chatml(), {"messages": [ASK, CALLING]})
    assert refusal == (
        "the model's chat template leaves out calls of tools (here 'weather'); use a model whose template knows tools, "
        "or write them as text"
    )


def test_tools_that_a_template_leaves_out_are_refused_even_where_their_names_are_in_the_words() -> None:
    row = {"messages": [{"role": "user", "content": "How is the weather?"}, ANSWER], "tools": [TOOL]}
    assert "leaves out the tools on offer (here 'weather')" in reason(tokenizers.chatml(), row)


def test_a_template_that_lists_tools_but_drops_calls_is_found_out() -> None:
    assert "leaves out calls of tools" in reason(of_family("lfm2"), ROW)


@pytest.mark.parametrize("family", ["llama3", "phi3", "gemma3", "deepseek_r1_distill"])
def test_real_templates_without_tools_are_refused_by_what_they_leave_out(family: str) -> None:
    assert "leaves out the tools on offer (here 'weather')" in reason(of_family(family), ROW)


def test_rows_without_tools_are_fine_with_any_template() -> None:
    assert learned(of_family("llama3"), {"messages": [ASK, ANSWER], "tools": []})


def test_a_template_that_wants_arguments_as_text_gets_text() -> None:
    """DeepSeek V3's adds them to a string, which no object allows. It lists no tools."""
    tokenizer = of_family("deepseekv3")
    row = {"messages": ROW["messages"]}
    (sample,) = samples_of([messages({"messages": [ASK, CALLING, RESULT, ANSWER]})], tokenizer, 1, 10_000)
    assert '```json\n{"city": "Rome"}\n```' in tokenizer.decode(sample.input_ids)
    text = tokenizers.KNOWS_TOOLS.replace("call.function | tojson", "call.function.name + call.function.arguments")
    own = tokenizers.chatml(text)
    assert chat_template(own).text_arguments
    assert learned(own, row)[0] == '<tool_call>weather{"city": "Rome"}</tool_call><|im_end|>'


def test_the_default_template_shows_tools_and_calls() -> None:
    tokenizer = tokenizers.sentence_piece()
    call, answer = learned(tokenizer, ROW)
    assert '"name": "weather"' in call
    assert '"city": "Rome"' in call
    assert answer.endswith("It is dry.</s>")
    text = chat_template(tokenizer).render(ROW["messages"][:1], ROW["tools"], prompt=True)
    assert text.startswith('<s>TOOLS: [{"type": "function", "function": {"name": "weather"')


def test_a_sample_of_a_conversation_that_ends_with_a_call_expects_the_call() -> None:
    row = messages({"messages": [ASK, CALLING], "tools": [TOOL]})
    (sample,) = samples_of([row], tokenizers.chatml(tokenizers.KNOWS_TOOLS), 1, 10_000)
    assert sample.prompt == "Rain?"
    assert json.loads(sample.reference) == [{"name": "weather", "arguments": {"city": "Rome"}}]


def test_a_row_that_only_the_version_for_training_takes_is_no_sample() -> None:
    tokenizer = tokenizers.sentence_piece(tokenizers.LLAMA_2_LIKE)
    odd = messages({"messages": [{"role": "system", "content": "x"}, ASK, ANSWER]})
    plain = messages({"messages": [ASK, ANSWER]})
    assert [sample.prompt for sample in samples_of([odd, plain], tokenizer, 2, 10_000)] == ["Rain?"]
