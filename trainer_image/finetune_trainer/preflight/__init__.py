"""`python -m finetune_trainer.preflight`: a job is looked at on a CPU before it takes GPUs.

Reaches what the job reads and where it writes, reads and masks some rows, counts what will train, estimates memory, and
ends with the exit code that tells the operator what to do; what it has found is in the termination message.
"""
