"""`python -m finetune_trainer.checkpoints`: the uploader, started by the training process."""

from finetune_trainer.checkpoints.uploader import main

main()
