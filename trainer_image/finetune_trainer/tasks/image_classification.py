"""The class of an image: ViT, ResNet and their kin through transformers, VGG, Inception and others through timm."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune_trainer.data.images.collator import ImageCollator
from finetune_trainer.data.images.preparation import PreparedImages, prepare_images
from finetune_trainer.data.images.processor import load_image_processor
from finetune_trainer.errors import UsageError
from finetune_trainer.evaluation.targets import OneClass
from finetune_trainer.loaded import is_weightless
from finetune_trainer.model import FIELD
from finetune_trainer.tasks.base import Inputs
from finetune_trainer.tasks.head import HeadTask, HeadTrainer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments

CHANNELS = 3


class ImageClassificationTask(HeadTask):
    """Images with one class each; their size and scale are the business of the model's own image processor."""

    loader = "AutoModelForImageClassification"
    pipeline_tag = "image-classification"
    peft_task = None
    mapping = "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"
    usable = "an image model such as ViT, Swin, ConvNeXt, ResNet, or one of timm's"
    prepared: PreparedImages
    processor: Any

    def refuse_files(self, names: set[str]) -> None:
        """Whether an image processor must lie beside the weights shows in config.json: those of timm hold their own."""

    def check(self, config: PretrainedConfig, reserved: int = 0) -> None:
        super().check(config, reserved)
        refuse_unknown_to_timm(config, self.spec.model.uri)
        channels = channels_of(config)
        if channels != CHANNELS:
            raise UsageError(
                f"{FIELD}: {self.spec.model.uri} takes images of {channels} channels, and images are read as RGB",
                "use a model with 3 channels",
            )

    def read_processor(self, folder: Path, config: PretrainedConfig) -> Any:
        self.processor = load_image_processor(folder, self.spec.model, config)
        return self.processor

    def prepare(self, inputs: Inputs) -> PreparedImages:
        self.prepared = prepare_images(
            inputs.files,
            self.spec.dataset,
            self.spec.task.labels,
            seed=self.spec.hyperparameters.seed,
            scratch=inputs.scratch,
            validation_files=inputs.validation_files,
            order=self.known,
            processes=self.spec.hyperparameters.data_workers,
            progress=inputs.progress,
        )
        self.target = OneClass(self.prepared.classes)
        return self.prepared

    def configure(self, config: PretrainedConfig) -> None:
        super().configure(config)
        if hasattr(config, "label_names"):
            # timm's own names of the classes, which its wrapper would write instead of ours.
            config.label_names = list(self.target.labels)
            config.label_descriptions = None

    @property
    def collator(self) -> ImageCollator:
        return ImageCollator(self.processor)

    def finish(self, model: PreTrainedModel) -> None:
        super().finish(model)
        if self.spec.hyperparameters.gradient_checkpointing and not model.supports_gradient_checkpointing:
            raise UsageError(
                f"spec.hyperparameters.gradientCheckpointing: {model.config.model_type} cannot compute its activations "
                "again",
                "set gradientCheckpointing to false",
            )

    def trainer(
        self, model: PreTrainedModel, arguments: TrainingArguments, callbacks: list[TrainerCallback]
    ) -> HeadTrainer:
        trainer = super().trainer(model, arguments, callbacks)
        if not is_weightless(model):
            self._try(trainer)
        return trainer

    def _try(self, trainer: HeadTrainer) -> None:
        """Raise UsageError when the model does not take the images that its image processor makes."""
        pixels = self.probe(trainer.model)["pixel_values"]
        training = trainer.model.training
        trainer.model.eval()
        try:
            with torch.no_grad(), trainer.accelerator.autocast():
                trainer.model(pixel_values=pixels)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            *_, height, width = pixels.shape
            raise UsageError(
                f"{FIELD}: the model of {self.spec.model.uri} does not take the images of {height} x {width} pixels "
                f"that its image processor makes: {error}",
                "correct size or crop_size in preprocessor_config.json (of timm: input_size in pretrained_cfg)",
            ) from error
        finally:
            trainer.model.train(training)

    def probe(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Pixels in the precision of the model: not every architecture casts them itself."""
        return {name: tensor.to(model.dtype) for name, tensor in super().probe(model).items()}


def refuse_unknown_to_timm(config: PretrainedConfig, uri: str) -> None:
    """Raise UsageError where only timm could build the model, and cannot."""
    import timm

    if config.model_type == "timm_wrapper" and not timm.is_model(config.architecture):
        near = get_close_matches(config.architecture, timm.list_models(), n=3)
        raise UsageError(
            f"{FIELD}: timm does not know the architecture {config.architecture!r} of {uri}",
            f"use one of timm {timm.__version__}{', such as ' + ', '.join(near) if near else ''}",
        )


def channels_of(config: PretrainedConfig) -> int:
    """How many channels the images of a model have."""
    timm = getattr(config, "pretrained_cfg", None) or {}
    given = (getattr(config, "model_args", None) or {}).get("in_chans")
    return given or getattr(config, "num_channels", None) or (timm.get("input_size") or [CHANNELS])[0]
