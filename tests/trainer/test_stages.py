"""What the stages of an unfreezing are, and when they begin."""

from __future__ import annotations

import re

import pytest

from finetune_api.strategy import Unfreezing
from finetune_trainer.errors import UsageError
from finetune_trainer.unfreezing import stage_at, stages, starts
from tests.support.architectures import tiny_bert, tiny_gpt2, tiny_llama, tiny_vit


def options(**said) -> Unfreezing:
    return Unfreezing.from_wire({"everySteps": 1} | said)


def learning_of(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def depths(model, added: list[frozenset[str]]) -> list[set[str]]:
    """What each stage adds, in short: the numbers of blocks, and the first parts of other names."""
    short = [{_short(name) for name in names} for names in added]
    return [now - before for before, now in zip([set(), *short], short, strict=False)]


def _short(name: str) -> str:
    block = re.search(r"(?:layers|layer|h)\.(\d)\.", name)
    return block[1] if block else name.removeprefix("bert.").removeprefix("vit.").removeprefix("model.").split(".")[0]


BY_LAYERS = {
    "Llama": (tiny_llama, 1, [{"norm", "lm_head"}, {"1"}, {"0", "embed_tokens"}]),
    "all blocks at once": (tiny_llama, 9, [{"norm", "lm_head"}, {"0", "1", "embed_tokens"}]),
    "BERT": (tiny_bert, 1, [{"pooler", "classifier"}, {"2"}, {"1"}, {"0", "embeddings"}]),
    "two blocks a stage": (tiny_bert, 2, [{"pooler", "classifier"}, {"2", "1"}, {"0", "embeddings"}]),
    "ViT": (tiny_vit, 1, [{"layernorm", "classifier"}, {"2"}, {"1"}, {"0", "embeddings"}]),
    "a head that is the embedding": (tiny_gpt2, 3, [{"transformer"}, {"0", "1", "2"}]),
}


@pytest.mark.parametrize("case", BY_LAYERS)
def test_stages_go_from_the_head_to_the_embedding(case):
    build, count, expected = BY_LAYERS[case]
    model = build()
    found = stages(model, learning_of(model), set(), options(layersPerStage=count))
    assert depths(model, found) == expected
    assert found[-1] == learning_of(model)


def test_an_embedding_that_is_the_head_comes_last():
    model = tiny_gpt2()
    first, *_, last = stages(model, learning_of(model), set(), options())
    assert first == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert "transformer.wte.weight" in last


def test_blocks_in_which_nothing_learns_are_no_stages():
    model = tiny_bert()
    some = {name for name in learning_of(model) if re.search(r"layer\.[02].*LayerNorm", name)}
    assert depths(model, stages(model, some, set(), options())) == [{"2"}, {"0"}]


def test_what_is_new_learns_in_the_first_stage_wherever_it_lies():
    model = tiny_bert()
    fresh = {name for name in learning_of(model) if "layer.0.output" in name or "classifier" in name}
    assert fresh <= stages(model, learning_of(model), fresh, options())[0]
    named = stages(model, learning_of(model), fresh, options(stages=[{"layers": {"last": 1}}, {"layers": {"last": 3}}]))
    assert fresh <= named[0]


def test_named_stages_add_what_they_name_and_the_last_one_the_rest():
    model = tiny_bert()
    parts = [{"modules": ["Head"]}, {"modules": ["LayerNorm"]}, {"layers": {"last": 1}}]
    found = stages(model, learning_of(model), set(), options(stages=parts))
    assert all("classifier" in name or "pooler" in name for name in found[0])
    assert all("LayerNorm" in name for name in found[1] - found[0])
    assert found[2] == learning_of(model)


REFUSED = {
    "one stage only": (
        {"layersPerStage": 1},
        r"unfreezing: there is only one stage, in which all learns that ever does: Attention; blocks 1",
    ),
    "nothing learns in it": (
        {"stages": [{"layers": {"last": 1}}, {"modules": ["FeedForward"]}]},
        r"unfreezing\.stages\[1\]: nothing that learns begins with it",
    ),
    "no such block": (
        {"stages": [{"layers": {"last": 5}}, {"layers": {"first": 1}}]},
        r"unfreezing\.stages\[0\]\.layers\.last is 5, but the model has only 2 blocks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_stage_without_effect_is_refused(case):
    said, message = REFUSED[case]
    model = tiny_llama()
    some = {name for name in learning_of(model) if "layers.1.self_attn" in name}
    with pytest.raises(UsageError, match=message):
        stages(model, some, set(), options(**said))


STARTS = {
    "steps": ({"everySteps": 50}, 7, [0, 50, 100, 150]),
    "epochs": ({"everySteps": None, "everyEpochs": 1}, 7, [0, 7, 14, 21]),
    "half epochs begin at the next step": ({"everySteps": None, "everyEpochs": 0.5}, 7, [0, 4, 7, 11]),
    "tenths of an epoch": ({"everySteps": None, "everyEpochs": 0.1}, 10, [0, 1, 2, 3]),
    "less than a step": ({"everySteps": None, "everyEpochs": 0.01}, 10, [0, 1, 1, 1]),
}


@pytest.mark.parametrize("case", STARTS)
def test_stages_begin_after_steps_or_epochs(case):
    said, per_epoch, expected = STARTS[case]
    assert starts(options(**said), 4, lambda: per_epoch) == expected


def test_by_steps_a_stream_will_do():
    assert starts(options(everySteps=5), 3, lambda: len(iter(()))) == [0, 5, 10]


def test_the_stage_follows_from_the_number_of_steps():
    assert [stage_at(step, [0, 2, 4]) for step in range(6)] == [0, 0, 1, 1, 2, 2]
    assert stage_at(1, [0, 1, 1, 1]) == 3
