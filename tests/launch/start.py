"""`python -m tests.launch.start module:function [seconds to wait for the gang]`: launch with another entry point."""

from __future__ import annotations

import os
import sys

from finetune_trainer.launch import launch

if __name__ == "__main__":
    if "TEST_SILENT_SECONDS" in os.environ:
        from finetune_trainer import pulse

        pulse.SILENT_SECONDS = float(os.environ["TEST_SILENT_SECONDS"])
    patience = float(sys.argv[2]) if len(sys.argv) > 2 else 60.0
    code = launch(entrypoint=sys.argv[1], rendezvous_seconds=patience)
    sys.stderr.flush()
    os._exit(code)
