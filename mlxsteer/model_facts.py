"""What a model has to steer: its keys by layer, shapes, dtypes, quantization, chat template."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxsteer import checking

if TYPE_CHECKING:
    from mlxsteer.model import InterpretableModel


@dataclass(frozen=True)
class KeyRow:
    """One kind of place, and the layers that have it.

    Attributes:
        key: ``"layers.*.self_attn.q_proj"``, or a key outside the blocks.
        role: the role name it also goes by, or an empty text.
        layers: ``"0-27"``; empty outside the blocks.
        width: features of the activation there, where that can be told without running anything.
        weight: what its own weight is: shape, dtype or quantization; empty where it has none.
    """

    key: str
    role: str
    layers: str
    width: int | None
    weight: str


@dataclass(frozen=True)
class ModelFacts:
    """What a model has; a notebook and `mlxsteer inspect` show it.

    Attributes:
        name: what the model was loaded by.
        architecture: its `model_type`.
        layers: number of blocks.
        parameters: number of weights, quantized ones counted as such.
        dtypes: dtype → number of arrays.
        quantization: kinds of quantization, such as ``"4-bit affine, group 64"``, each with how many layers.
        chat_template: whether the tokenizer has one; None without a tokenizer.
        keys: one row for each kind of place.
        check: what a check of the model found, in words; None unless asked for.
    """

    name: str
    architecture: str
    layers: int
    parameters: int
    dtypes: dict[str, int]
    quantization: dict[str, int]
    chat_template: bool | None
    keys: tuple[KeyRow, ...]
    check: str | None = None

    def as_data(self) -> dict[str, Any]:
        """All of it as a dict that JSON takes."""
        return asdict(self)

    def words(self) -> list[str]:
        """What holds for the whole model, in lines."""
        said = ", ".join(f"{name} ({count} modules)" for name, count in self.quantization.items())
        return [
            f"dtypes: {', '.join(f'{name} ({count} arrays)' for name, count in self.dtypes.items())}",
            f"quantization: {said or 'none'}",
            f"chat template: { {None: 'no tokenizer', True: 'yes', False: 'none'}[self.chat_template] }",
        ]


def model_facts(model: InterpretableModel, *, check: bool = False) -> ModelFacts:
    """Collect what a model has, without running it, unless a check is asked for.

    Args:
        model: the model.
        check: run `model.check`'s forwards too.
    """
    sites = model._sites
    sites.read()  # it may have been quantized since
    kinds: dict[tuple[str, int | None, str], list[int]] = {}
    roles: dict[str, str] = {}
    for layer in range(len(sites.blocks)):
        for role in sites.roles(layer):
            key = _starred(sites.resolve(f"layers.{layer}.{role}").key)
            if role.endswith(".heads"):
                roles[key.removesuffix(".heads")] = f"layers.*.{role.removesuffix('.heads')}, heads"
            else:
                roles.setdefault(key, f"layers.*.{role}")
    for key, module in sites.modules.items():
        site = sites.resolve(key)
        layers = kinds.setdefault((_starred(key), sites.width(site), _weight(module)), [])
        layers += [] if site.layer is None else [site.layer]
    rows = [
        KeyRow(key, roles.get(key, ""), _span(layers), width, weight) for (key, width, weight), layers in kinds.items()
    ]
    arrays: list[tuple[str, Any]] = tree_flatten(model.model.parameters())
    return ModelFacts(
        model.name,
        sites.model_type or type(model.model).__name__,
        len(sites.blocks),
        sum(_count(module) for module in model.model.modules()),
        _counted(str(array.dtype).rsplit(".", 1)[-1] for _, array in arrays),
        _counted(said for module in sites.model.modules() if (said := _quantized(module))),
        None if model.tokenizer is None else bool(model.tokenizer.has_chat_template),
        (*rows, KeyRow("logits", "", "", None, "")),
        str(checking.check(sites)) if check else None,
    )


def _starred(key: str) -> str:
    parts = key.split(".")
    return ".".join(["layers", "*", *parts[2:]]) if parts[0] == "layers" and len(parts) > 1 else key


def _span(layers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _quantized(module: nn.Module) -> str:
    bits = getattr(module, "bits", None)
    if bits is None or "scales" not in module:
        return ""
    return f"{bits}-bit {getattr(module, 'mode', 'affine')}, group {module.group_size}"


def _weight(module: nn.Module) -> str:
    """Shape and kind of a module's own weight."""
    weight = module.get("weight")
    if weight is None:
        return ""
    shape = list(weight.shape)
    if quantized := _quantized(module):
        shape[-1] = shape[-1] * 32 // module.bits
    kind = quantized or str(weight.dtype).rsplit(".", 1)[-1]
    return f"{' × '.join(map(str, shape))} {kind}"


def _count(module: nn.Module) -> int:
    """The number of a module's own weights; a quantized one's scales are none."""
    quantized = bool(_quantized(module))
    total = 0
    for name, value in module.items():
        if not hasattr(value, "dtype") or (quantized and name in ("scales", "biases")):
            continue
        total += value.size * 32 // module.bits if quantized and name == "weight" else value.size
    return total


def _counted(words: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in words:
        found[word] = found.get(word, 0) + 1
    return found
