"""1,797 real handwritten digits that scikit-learn carries (UCI, Alpaydin and Kaynak, 1998), as images in folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

INK = 255 / 16
"""The images have 17 shades, 0 to 16."""
PARTS = {"0-4": range(5), "5-9": range(5, 10)}


def write(folder: Path) -> Path:
    """Write <part>/<digit>/<number>.png, 8 x 8 pixels each; what is there already is kept."""
    digits = load_digits()
    for part, classes in PARTS.items():
        for number in np.flatnonzero(np.isin(digits.target, classes)):
            path = folder / part / str(digits.target[number]) / f"{number:04}.png"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((digits.images[number] * INK).astype(np.uint8)).save(path)
    return folder
