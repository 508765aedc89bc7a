"""Checkpoint -> Hugging Face folder -> 4-bit mlx-lm folder, with checksums."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from .model import Config
from .tokenizer import BOS, END, EOS, PAD

GROUP_SIZE = 64
BITS = 4
SHIPPED = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "README.md",
)


def write_float32(checkpoint: Path, tokenizer: Path, folder: Path) -> None:
    """The weights in float32 under Hugging Face's names, loadable by transformers and mlx-lm."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=False)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": tensor.float().contiguous() for name, tensor in state["model"].items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", Config(**state["config"]).hugging_face())
    write_json(
        folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": [EOS, END], "pad_token_id": PAD}
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder / name)


def quantize(source: Path, folder: Path) -> None:
    """4 bits, groups of 64, float32 scales, by mlx-lm's own converter; only the files that ship are kept."""
    from mlx_lm import convert

    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    convert(
        str(source),
        str(temporary),
        quantize=True,
        q_group_size=GROUP_SIZE,
        q_bits=BITS,
        q_mode="affine",
        dtype="float32",
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        if name != "README.md":
            origin = temporary if (temporary / name).exists() else source
            shutil.copy(origin / name, folder / name)
    shutil.copy(source / "tokenizer_config.json", folder / "tokenizer_config.json")
    shutil.rmtree(temporary)


def write_checksums(folder: Path) -> dict[str, str]:
    """``checksums.json``: SHA-256 of every shipped file that exists."""
    sums = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SHIPPED if (folder / name).exists()
    }
    write_json(folder / "checksums.json", sums)
    return sums


def write_json(path: Path, value: object) -> None:
    """Atomic JSON file."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def total_megabytes(folder: Path) -> float:
    """Size of the files in a folder, in megabytes of 10**6 bytes."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / 1e6
