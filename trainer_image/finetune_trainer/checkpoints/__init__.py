"""Checkpoints in the bucket: a step without a complete manifest does not exist.

    <output.uri>/checkpoints/step-00000200/
        trainable.safetensors  optimizer.safetensors      tensors of what learns, and the optimizer's
        trainable-00003-of-00008.safetensors ...          rank 3's parts, where the model is sharded
        optimizer.pt  scheduler.pt  scaler.pt             numbers and settings
        rng.safetensors                                   the generators of every rank
        trainer_state.json                                position, log, callbacks
        manifest.json                                     written last: names, sizes and checksums of all files

At a step's end each rank copies what it holds into memory that it shares with a background process, and trains on; the
processes upload, rank 0's commits the manifest when all are done, and removes what is no longer kept.
"""

from finetune_trainer.checkpoints.checkpoints import Checkpoints
from finetune_trainer.checkpoints.manifest import Manifest

__all__ = ["Checkpoints", "Manifest"]
