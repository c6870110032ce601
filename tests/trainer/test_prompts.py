"""PromptTuning and PrefixTuning: virtual tokens that are learned beside a model that stays as it is."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from finetune_trainer.data.samples import Sample
from finetune_trainer.errors import UsageError
from finetune_trainer.evaluation.answers import answers
from finetune_trainer.verification import VerificationError
from tests.support.architectures import SEQUENCE, tiny_bert, tiny_gpt2, tiny_llama, tiny_resnet
from tests.support.jobs import a_job, a_session, run
from tests.support.models import byte_tokenizer, changed, state_of
from tests.support.prepared import a_batch, a_strategy, answer, delivered, learn, loaded

PROMPT, PREFIX = "PromptTuning", "PrefixTuning"
WAYS = {
    "embeddings": (PROMPT, {"tokens": 8}, 0.3),
    "embeddings of a text": (PROMPT, {"tokens": 8, "initText": "Say the number."}, 0.3),
    "an MLP's": (PROMPT, {"tokens": 8, "encoder": "MLP"}, 1e-2),
    "an LSTM's": (PROMPT, {"tokens": 8, "encoder": "LSTM"}, 1e-2),
    "keys and values": (PREFIX, {"tokens": 8}, 0.1),
    "a network's keys and values": (PREFIX, {"tokens": 8, "projection": True}, 1e-2),
}
every_way = pytest.mark.parametrize("way", WAYS)
IDS = {"input_ids": torch.arange(4, 40)[None]}


def job(root, way, task="Instruction", **more):
    strategy, options, rate = WAYS[way]
    member = strategy[0].lower() + strategy[1:]
    hyperparameters = {"learningRate": rate, **more.pop("hyperparameters", {})}
    return a_job(root, strategy, task, **{member: options}, hyperparameters=hyperparameters, **more)


def of(way):
    strategy, options, _ = WAYS[way]
    return a_strategy(strategy, **options)


def strong(model):
    """The model with larger weights, so that its answers depend on every token and every virtual one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.mark.parametrize("task", ["Instruction", "CausalLM"])
@every_way
def test_a_job_lowers_the_loss_and_delivers_kilobytes(tmp_path, way, task):
    result = run(job(tmp_path, way, task), tmp_path / "scratch")
    assert result.metrics["eval_loss"] < result.baseline["eval_loss"] - 0.03
    folder = tmp_path / "out/adapter"
    (prompt,) = load_file(folder / "adapter_model.safetensors").values()
    assert prompt.shape[0] == 8
    assert (folder / "adapter_model.safetensors").stat().st_size < 8192
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"file://{tmp_path}/model"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = answer(base, IDS)
    after = answer(PeftModel.from_pretrained(base, str(folder)), IDS)
    assert not torch.allclose(before, after[:, -36:], atol=1e-3)


@every_way
def test_exactly_the_virtual_tokens_move_and_come_back(tmp_path, way):
    session = a_session(job(tmp_path, way), tmp_path / "scratch")
    model = session.trainer.model
    before = state_of(model)
    session.trainer.train()
    assert changed(before, state_of(model)) == {name for name in before if name.startswith("prompt_encoder.")}
    folder = delivered(session.strategy, model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found, expected = answer(PeftModel.from_pretrained(base, str(folder)), IDS), answer(model, IDS)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


@every_way
def test_what_a_prompt_is_compared_with_is_the_base(tmp_path, way):
    plain = run(a_job(tmp_path / "one", "IA3"), tmp_path / "one/scratch")
    result = run(job(tmp_path / "two", way), tmp_path / "two/scratch")
    assert result.baseline == pytest.approx(plain.baseline)
    assert [sample["before"] for sample in result.samples] == [sample["before"] for sample in plain.samples]


def test_an_untrained_prompt_is_not_delivered(tmp_path):
    with pytest.raises(VerificationError, match="changes nothing"):
        run(job(tmp_path, "embeddings", hyperparameters={"learningRate": 1e-30}), tmp_path / "scratch")


def test_a_prompt_begins_with_the_embeddings_of_a_text_again_and_again():
    tokenizer, model = byte_tokenizer(), tiny_llama()
    strategy = a_strategy(PROMPT, tokens=5, initText="ab")
    prepared = strategy.prepare(loaded(model, encode=tokenizer.encode))
    expected = model.get_input_embeddings().weight[torch.tensor(tokenizer.encode("ababa"))]
    assert torch.equal(prepared.prompt_encoder["default"].embedding.weight, expected)


def test_a_prompt_without_a_text_begins_with_embeddings_of_the_vocabulary():
    model = tiny_llama()
    prompt = a_strategy(PROMPT, tokens=5).prepare(loaded(model)).prompt_encoder["default"].embedding.weight
    assert (prompt[:, None] == model.get_input_embeddings().weight[None]).all(dim=-1).any(dim=-1).all()


def test_a_text_without_tokens_is_refused():
    strategy = a_strategy(PROMPT, initText=" ")
    with pytest.raises(UsageError, match="initText: the tokenizer makes no tokens of it"):
        strategy.prepare(loaded(tiny_llama(), encode=lambda text: []))


STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CLASSIFIERS = {
    "BERT": (lambda: tiny_bert(**STILL), "classifier"),
    "Llama": (lambda: tiny_llama(2), "score"),
    "ALBERT, whose embeddings are narrow": (
        lambda: AlbertForSequenceClassification(
            AlbertConfig(vocab_size=272, embedding_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, classifier_dropout_prob=0.0, **STILL)
        ),
        "classifier",
    ),
}  # fmt: skip
PAIRS = [
    *((family, way) for family in ("BERT", "Llama") for way in WAYS),
    ("ALBERT, whose embeddings are narrow", "embeddings"),
]


@pytest.mark.parametrize(("family", "way"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_classifiers_learn_their_head_too(tmp_path, family, way, dtype):
    build, head = CLASSIFIERS[family]
    base = strong(build()).to(dtype)
    again = copy.deepcopy(base)
    again.get_submodule(head).weight.data.normal_()
    strategy = of(way)
    model = strategy.prepare(loaded(base, (head,), encode=byte_tokenizer().encode))
    before, batch = state_of(model), a_batch(base)
    losses = learn(model, batch, steps=20)
    assert losses[-1] < losses[0]
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed(before, state_of(model)) == learning
    assert {name.partition(".default")[0] for name in learning} == {
        "prompt_encoder",
        f"base_model.{head}.modules_to_save",
    }
    assert {model.get_parameter(name).dtype for name in learning} == {torch.float32}
    expected = answer(model, batch)
    plain = PeftModel.from_pretrained(again, str(delivered(strategy, model, tmp_path)))
    close = {"rtol": 0, "atol": (1e-4 if dtype is torch.float32 else 3e-2) * expected.abs().max().item()}
    assert torch.allclose(answer(plain, batch), expected, **close)
    apart = strategy.apart(model)
    assert set(apart.state_dict()) == set(build().state_dict())
    assert torch.allclose(answer(strategy.together(apart, tmp_path), batch), expected, **close)


@pytest.mark.parametrize(("family", "side"), [("BERT", "right"), ("Llama", "right"), ("Llama", "left")])
@every_way
def test_a_classifier_answers_to_a_padded_row_as_to_the_row_alone(family, way, side):
    build, head = CLASSIFIERS[family]
    base = strong(build())
    model = of(way).prepare(loaded(base, (head,), encode=byte_tokenizer().encode))
    ids = a_batch(base)["input_ids"]
    mask = torch.ones_like(ids)
    alone = answer(model, {"input_ids": ids[1:2, :6], "attention_mask": mask[1:2, :6]})[0]
    ids[1, 6:], mask[1, 6:] = base.config.pad_token_id, 0
    if side == "left":
        ids[1], mask[1] = ids[1].roll(4), mask[1].roll(4)
    padded = {"input_ids": ids, "attention_mask": mask}
    assert torch.allclose(answer(model, padded)[1], alone, atol=1e-4)


@every_way
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_generation_meets_the_virtual_tokens_once(way, build):
    tokenizer, base = byte_tokenizer(), strong(build())
    model = of(way).prepare(loaded(base, encode=tokenizer.encode))
    for parameter in model.prompt_encoder.parameters():
        parameter.data.normal_()
    prompts = [[7, 8, 9, 10], [20, 21]]  # padded to one length
    samples = [Sample(prompt="", reference="", input_ids=prompt) for prompt in prompts]
    spoken = answers(model, tokenizer, samples, eos_token_ids=[271], positions=12, beat=lambda: None)
    for prompt, text in zip(prompts, spoken, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(8):
            ids = torch.cat([ids, answer(model, {"input_ids": ids})[:, -1:].argmax(dim=-1)], dim=1)
        assert tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip() == text


def test_prompts_learn_the_same_with_recomputed_activations():
    gradients = []
    for recompute in (False, True):
        base = tiny_llama()
        torch.manual_seed(1)
        model = a_strategy(PROMPT).prepare(loaded(base))
        if recompute:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**a_batch(base)).loss.backward()
        gradients.append(model.prompt_encoder["default"].embedding.weight.grad)
    assert gradients[0].norm() > 0
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_narrow_embeddings_of_a_language_model_are_met():
    base = OPTForCausalLM(OPTConfig(**SEQUENCE, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                                    word_embed_proj_dim=16))  # fmt: skip
    model = a_strategy(PROMPT, tokens=3).prepare(loaded(base))
    assert answer(model, a_batch(base)).shape == (4, 13, 272)


REFUSED = {
    "DistilBERT takes no prefix": (
        lambda: DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=272, dim=32, hidden_dim=64, n_layers=2, n_heads=4)),
        PREFIX, "DistilBertForSequenceClassification does not take the virtual tokens of PrefixTuning"),
    "ALBERT takes no prefix": (CLASSIFIERS["ALBERT, whose embeddings are narrow"][0], PREFIX, "does not take"),
    "Mamba has nothing for a prefix": (
        lambda: MambaForCausalLM(MambaConfig(**SEQUENCE, hidden_size=32, num_hidden_layers=2)),
        PREFIX, "does not take"),
    "ResNet sees no text": (tiny_resnet, PROMPT, "ResNetForImageClassification does not take"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_architectures_that_take_no_virtual_tokens_are_refused(case):
    build, kind, words = REFUSED[case]
    with pytest.raises(UsageError, match=words) as caught:
        a_strategy(kind).prepare(loaded(build()))
    assert caught.value.message.startswith("spec.strategy.type: ")
    assert caught.value.advice == "use LoRA, IA3 or Adapter"


@pytest.mark.parametrize("way", ["embeddings", "keys and values"])
def test_virtual_tokens_count_against_the_positions(tmp_path, way):
    with pytest.raises(UsageError, match=r"maxLength is 505, .* 512 positions, of which 8 are taken by virtual tokens"):
        run(job(tmp_path, way, hyperparameters={"maxLength": 505}), tmp_path / "scratch")


def test_noise_on_embeddings_that_cannot_be_reached_is_refused():
    strategy = a_strategy(PROMPT)
    model = strategy.prepare(loaded(tiny_gpt2()))
    trainer = SimpleNamespace(model=model, args=SimpleNamespace(neftune_noise_alpha=5.0))
    with pytest.raises(UsageError, match="neftuneAlpha does not reach the embeddings of GPT2LMHeadModel"):
        strategy.attach(trainer)


def test_noise_on_embeddings_goes_with_prompts(tmp_path):
    result = run(job(tmp_path, "embeddings", hyperparameters={"neftuneAlpha": 1.0}), tmp_path / "scratch")
    assert result.metrics["eval_loss"] < result.baseline["eval_loss"]
