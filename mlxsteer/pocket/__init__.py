"""The bundled model: a 4-bit Llama of 5.5 million parameters, trained on program-generated English."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

FOLDER = Path(__file__).parent / "model"


def verified() -> Path:
    """The model's folder, if its files are those that the package was made with.

    Raises:
        OSError: a file is missing or changed.
    """
    sums = json.loads((FOLDER / "checksums.json").read_text(encoding="utf-8"))
    for name, expected in sums.items():
        path = FOLDER / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            state = "is damaged or was changed" if path.is_file() else "is missing"
            raise OSError(f"the bundled model's {name} {state}: install mlxsteer anew.")
    return FOLDER
