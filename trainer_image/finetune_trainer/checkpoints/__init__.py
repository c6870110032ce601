"""Checkpoints in the bucket: a step without a complete manifest does not exist.

    <output.uri>/checkpoints/step-00000200/{trainable.safetensors, optimizer.pt, scheduler.pt, rng_state.pth, ...}
    <output.uri>/checkpoints/step-00000200/manifest.json      written last: names, sizes and checksums of the files

The training process writes a step to its scratch folder and goes on; a background process of low priority uploads it,
commits the manifest and removes what is no longer kept.
"""

from finetune_trainer.checkpoints.checkpoints import Checkpoints
from finetune_trainer.checkpoints.manifest import Manifest

__all__ = ["Checkpoints", "Manifest"]
