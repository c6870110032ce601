"""A program that moves data in a process of its own, to be killed or measured: MODE URI FOLDER."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from finetune_trainer.storage import Store
from tests.storage.conftest import QUICK


def peak_rss_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main(mode: str, uri: str, folder: str) -> None:
    with Store.connect(os.environ, QUICK if mode == "quick" else None) as store:
        store.list(uri)  # the SDK is loaded: what comes on top is the transfer's
        idle = peak_rss_bytes()
        if mode == "upload":
            store.upload_folder(Path(folder), uri)
        else:
            store.download(uri, Path(folder))
        print(peak_rss_bytes() - idle)


if __name__ == "__main__":
    main(*sys.argv[1:])
