"""What output.merge delivers is what PEFT merges in memory, byte by byte, and no host holds a model for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, PreTrainedModel

from finetune_api.job import FineTuneJob
from finetune_trainer import verification
from finetune_trainer.export import Exporter
from finetune_trainer.result import Output
from finetune_trainer.session import Start
from finetune_trainer.storage import Store
from finetune_trainer.strategies.base import save_model
from tests.estimate.ranks import Recount
from tests.support.architectures import tiny_mixtral
from tests.support.images import an_image_job, save_timm
from tests.support.jobs import a_context, a_job, a_session, run
from tests.support.models import save_tiny_bert, save_tiny_llama
from tests.trainer.test_labeled_text import a_labeled_job

MERGED = {"output": {"merge": True}, "hyperparameters": {"maxSteps": 2, "learningRate": 2e-2}}
TIED = {"tie_word_embeddings": True}
CASES: dict[str, tuple[Callable[[Path], object], Callable[[Path], FineTuneJob]]] = {
    "LoRA, tied": (lambda folder: save_tiny_llama(folder, **TIED), lambda root: a_job(root, **MERGED)),
    "LoRA, the tied head learns whole": (
        lambda folder: save_tiny_llama(folder, **TIED),
        lambda root: a_job(root, lora={"modulesToSave": ["lm_head"]}, **MERGED),
    ),
    "LoRA on the embedding, a module in each block learns whole": (
        save_tiny_llama,
        lambda root: a_job(root, lora={"targetModules": ["embed_tokens"], "modulesToSave": ["o_proj"]}, **MERGED),
    ),
    "DoRA, bfloat16": (
        lambda folder: save_tiny_llama(folder, torch.bfloat16),
        lambda root: a_job(root, lora={"doRA": True}, model={"dtype": "bfloat16"}, **MERGED),
    ),
    "QLoRA": (save_tiny_llama, lambda root: a_job(root, "QLoRA", **MERGED)),
    "LoRA on experts' attention": (
        lambda folder: _with_tokenizer(tiny_mixtral(), folder),
        lambda root: a_job(root, lora={"targetModules": ["q_proj", "v_proj"]}, **MERGED),
    ),
    "IA3": (save_tiny_llama, lambda root: a_job(root, "IA3", **MERGED)),
    "LoRA, a new head": (save_tiny_bert, lambda root: a_labeled_job(root, "LoRA", "classes", **MERGED)),
    "DoRA on blocks of one convolution": (
        lambda folder: save_timm(folder, "test_efficientnet", 64),
        lambda root: an_image_job(root, "LoRA", lora={"targetModules": ["conv_pw"], "doRA": True}, **MERGED),
    ),
}


def _with_tokenizer(model: PreTrainedModel, folder: Path) -> None:
    save_tiny_llama(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


def merged_in_memory(root: Path, folder: Path) -> Path:
    """What the library writes of a base that is loaded whole, and merged with the delivered adapter whole."""
    config = transformers.AutoConfig.from_pretrained(root / "out/model")
    dtype, loader = config.dtype, getattr(transformers, config.architectures[0])
    base = loader.from_pretrained(root / "model", config=config, dtype=torch.float32, ignore_mismatched_sizes=True)
    merged = PeftModel.from_pretrained(base, root / "out/adapter").merge_and_unload()
    save_model(merged, folder, dtype)
    return folder


def test_a_merged_model_generates_as_its_base_does_and_ends_where_answers_end(tmp_path):
    save_tiny_llama(tmp_path / "model")
    settings = {"do_sample": True, "temperature": 0.25, "eos_token_id": 5}
    GenerationConfig(**settings).save_pretrained(tmp_path / "model")
    run(a_job(tmp_path, **MERGED), tmp_path / "scratch")
    adapter, merged = (GenerationConfig.from_pretrained(tmp_path / "out" / kind) for kind in ("adapter", "model"))
    assert merged.to_dict() == adapter.to_dict()
    assert (merged.temperature, merged.eos_token_id) == (0.25, [3, 5])


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_that_are_merged_in_memory(tmp_path, case):
    save, build = CASES[case]
    save(tmp_path / "model")
    run(build(tmp_path), tmp_path / "scratch")
    expected, found = (
        {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}
        for folder in (merged_in_memory(tmp_path, tmp_path / "expected"), tmp_path / "out/model")
    )
    assert found == expected


class Meter(Recount):
    """Counts what operations are given, too: what is read from files is not made by any."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return super().__torch_dispatch__(func, types, args, kwargs)


def size_of(model: PreTrainedModel) -> int:
    """Bytes of a model in float32."""
    return sum(4 * parameter.numel() for parameter in model.parameters())


def delivering(job: FineTuneJob, root: Path) -> tuple[int, int]:
    """The most bytes of tensors that are held while a job's adapter is delivered, above the trained model; and those of
    a base in float32."""
    with Meter() as meter:
        session = a_session(job, root / "scratch")
        model = session.trainer.model
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
                parameter.mul_(1)
        before, meter.highest = meter.now(), 0
        with Store.connect({}) as store:
            Exporter(store, job.spec, session, root / "scratch", lambda: None, None).deliver(lambda kind: "")
    return meter.highest - before, size_of(model)


def test_a_block_and_what_lies_outside_of_blocks_is_all_that_is_held_of_it(tmp_path):
    save_tiny_llama(tmp_path / "model", num_hidden_layers=24)
    job = a_job(tmp_path, lora={"rank": 1, "targetModules": ["q_proj"]}, output={"merge": True})
    held, whole = delivering(job, tmp_path)
    assert held < whole / 4


def test_a_base_that_is_built_anew_for_what_shards_have_learned_is_read_block_by_block(tmp_path):
    save_tiny_llama(tmp_path / "model", num_hidden_layers=24)
    GenerationConfig(temperature=0.25, do_sample=True).save_pretrained(tmp_path / "model")
    job = a_job(tmp_path, lora={"rank": 1, "targetModules": ["q_proj"]})
    context = a_context(job, tmp_path / "scratch")
    with Store.connect({}) as store:
        start = Start.of(context, store, Output(store, job))
        session = start.open(start.fetch())
        probe = session.task.probe(session.trainer.model)
        expected = verification.logits(session.trainer.model, probe)
        with Meter() as meter:
            again = start.rebuild(session)
            found = verification.logits(again, probe)
    assert torch.equal(found, expected)
    assert again.generation_config.temperature == 0.25
    assert meter.highest < size_of(again) / 4
