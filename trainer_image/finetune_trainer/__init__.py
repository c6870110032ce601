"""The data plane: what runs in the pods.

Private by default: the libraries below read these variables when they are first imported, so they are set before any of
them can be. Nothing is sent or looked up anywhere unless the job names it.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
