"""What was written into weights: the report, the comparison with the hooked model, and the model card."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from huggingface_hub import snapshot_download

from mlxsteer import pocket
from mlxsteer.folders import in_bytes
from mlxsteer.folding import KEEPS, LINEAR, CannotBake, probes, read
from mlxsteer.generation import outside

if TYPE_CHECKING:
    from mlxsteer.model import InterpretableModel

TOLERANCE = {mx.float32: 1e-5, mx.float16: 1e-2, mx.bfloat16: 5e-2}
"""How far a baked model's logits may lie from the hooked one's, as a share of the largest logit, by dtype."""

_A_MODELS = ["*.json", "model*.safetensors", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja"]
"""Files of a repository that a model is made of, as mlx-lm loads them."""


class BakedDiffers(RuntimeError):
    """What was written doesn't do what the hooked model does; nothing is left of it."""


@dataclass(frozen=True)
class Comparison:
    """A written model, run by plain mlx-lm, against the hooked one, on the logits of a few prompts.

    Attributes:
        difference: largest difference of a logit between the two.
        effect: largest change of a logit by the interventions, hooked.
        tolerance: the difference that is allowed.
        prompts: the number of prompts.
    """

    difference: float
    effect: float
    tolerance: float
    prompts: int

    def __str__(self) -> str:
        return (
            f"logits differ from the hooked model's by {self.difference:.1e} at most on {self.prompts} prompts "
            f"({self.tolerance:.1e} allowed), which it moves by up to {self.effect:.2g}"
        )


def compared(
    model: InterpretableModel, interventions: Mapping[str, Any], folder: Path, adapter: Path | None = None
) -> Comparison:
    """Load a folder by plain mlx-lm and compare it with the hooked model.

    Args:
        model: the model that it was made of.
        interventions: what it is to do.
        folder: the model folder.
        adapter: an adapter to load with it.

    Raises:
        BakedDiffers: more than is allowed, or the tokens differ.
    """
    from mlxsteer.model import InterpretableModel

    options = {
        k: v
        for k, v in (model._loaded_with or {}).items()
        if k in ("tokenizer_config", "trust_remote_code") or (adapter is not None and k == "model_config")
    }
    path = {"adapter_path": str(adapter)} if adapter is not None else {}
    with seed_kept():
        loaded, tokenizer = mlx_lm.load(str(folder), **path, **options)[:2]
    prompts = probes(model)
    if model.tokenizer is not None and probes(InterpretableModel(loaded, tokenizer)) != prompts:
        raise BakedDiffers("the written folder's tokenizer gives other tokens than the model's: nothing is left of it.")
    differences, effects, ends, largest, dtype = [], [], [], 1.0, mx.float32
    for tokens in prompts:
        plain, hooked = (read(model, tokens, edit, ["logits"])["logits"] for edit in (None, interventions))
        logits = loaded(mx.array([tokens]))
        dtype = logits.dtype
        differences.append(mx.abs(logits.astype(mx.float32) - hooked))
        effects.append(mx.abs(hooked - plain))
        ends.append(hooked[0, -1])
        largest = max(largest, _number(mx.abs(hooked).max()))
    apart, moved = (mx.concatenate([x.reshape(-1) for x in xs]) for xs in (differences, effects))
    size, by, mean, mean_by = (_number(x) for x in (apart.max(), moved.max(), apart.mean(), moved.mean()))
    found = Comparison(size, by, TOLERANCE.get(dtype, TOLERANCE[mx.bfloat16]) * largest, len(prompts))
    # In 16 bits the allowed difference may be as large as an effect: then on average most of that must be there.
    lost = dtype != mx.float32 and mean_by > 4e-3 * largest and mean > 0.5 * mean_by
    if lost or not size <= found.tolerance:  # a NaN is no small difference
        raise BakedDiffers(f"the written model's {found}: nothing is left of it. Report this, please. {KEEPS}")
    if all(_number(mx.abs(end - ends[0]).max()) <= 1e-3 * largest for end in ends):
        warnings.warn(
            "the steered model gives the same logits after every prompt: what steers it drowns the text. Steer less "
            "strongly.",
            stacklevel=outside(),
        )
    return found


def counted(modules: Sequence[str]) -> str:
    """How many modules, in words."""
    return f"{len(modules)} module{'s' * (len(modules) != 1)}"


@dataclass(frozen=True)
class Baked:
    """What baking writes, or wrote.

    Attributes:
        path: the folder.
        edits: what is done at each edited module, in words.
        written_as: the model type in the new config.
        bytes_before, bytes_after: size of all weights.
        unquantized: paths of modules that were quantized and are stored at the model's own precision now.
        left: largest share of an ablated weight along its direction, ‖R̂W'‖/‖W'‖ over the modules that are edited at
            strength 1; None without ablation.
        comparison: with the hooked model; None for a dry run.
    """

    path: Path
    edits: tuple[str, ...]
    written_as: str
    bytes_before: int
    bytes_after: int
    unquantized: tuple[str, ...] = ()
    left: float | None = None
    comparison: Comparison | None = None

    @property
    def growth(self) -> float:
        """Size of the weights, as a multiple of what it was."""
        return self.bytes_after / self.bytes_before

    def __str__(self) -> str:
        size = f"{in_bytes(self.bytes_before)} → {in_bytes(self.bytes_after)} ({self.growth:.2f} ×)"
        lines = [f"{counted(self.edits)} edited, written as {self.written_as}; weights {size}"]
        if self.unquantized:
            lines.append(f"{counted(self.unquantized)} unquantized, since a quantized form would undo the edit")
        if self.left is not None:
            lines.append(f"at most {self.left:.1e} of an ablated weight lies along its direction")
        lines.append(str(self.comparison) if self.comparison is not None else "nothing written (dry run)")
        return "; ".join(lines) + "."

    def data(self) -> dict[str, Any]:
        """The report as JSON data, without the path."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "path"}


@contextmanager
def seed_kept() -> Iterator[None]:
    """Give MLX's random numbers their state back: a model is born random, and sampling is to go on as it would."""
    state: Any = mx.random.state
    high, low = state[0].tolist()  # a seed is the two halves of the state
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


def source_of(model: InterpretableModel) -> tuple[Path, dict[str, Any]]:
    """The folder that a model was loaded from, and its config as it was loaded.

    Raises:
        CannotBake: it came as a module, without a folder.
    """
    options = model._loaded_with
    if options is None:
        raise CannotBake(
            "a model given as a module has no folder with its config and tokenizer: save it (mlx_lm.utils.save) and "
            "load it by that folder, ms.InterpretableModel(folder)."
        )
    if model.name == "pocket":
        folder = pocket.FOLDER
    elif (folder := Path(model.name).expanduser()).is_dir():
        pass
    else:
        folder = Path(snapshot_download(model.name, revision=options.get("revision"), allow_patterns=_A_MODELS))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_file"):
        raise CannotBake(f"{model.name} runs code of its own ({config['model_file']}), which baking can't vouch for.")
    return folder, config | dict(options.get("model_config") or {})


def untied(model: InterpretableModel, embedding: nn.Module) -> bool:
    """Whether the head has a weight of its own: a linear module outside the blocks with a row per token."""
    inner = {id(m) for block in model._sites.blocks for m in block.modules()}
    rows = embedding["weight"].shape[0]
    return any(
        isinstance(m, LINEAR) and id(m) not in inner and m["weight"].shape[0] == rows for m in model.model.modules()
    )


def _number(x: mx.array) -> float:
    value: Any = x.item()
    return float(value)


def card(model: InterpretableModel, report: Any, use: str) -> str:
    """A model card: what was baked into what, and what was measured."""
    base = model.name if model.name.count("/") == 1 and not Path(model.name).exists() else Path(model.name).name
    hub = base == model.name and "/" in base
    edits = "\n".join(f"- `{line}`" for line in report.edits)
    return f"""---
library_name: mlx
pipeline_tag: text-generation
{f"base_model: {base}" if hub else ""}
tags:
- mlx
- steering
---

# {base}, steered

Made of **{base}** ({getattr(model.model, "model_type", "")}) by mlxsteer. It runs in plain mlx-lm (`{use}`).

## What is in it

{edits}

It acts on every token, of the prompt too.

## Measured

{report}
"""
