"""Interventions as a GGUF control vector, which llama.cpp adds while it runs a GGUF model.

``llama-cli -m model.gguf --control-vector-scaled steer.gguf:c`` computes, behind every block N ≥ 1 that has a
direction, x' = x + c·d_N at every token: our ``add_vector(d_N, strength=c)`` at ``layers.N``. The numbers are the same
ones: ``direction.N`` is ``layers.N``, both counted from 0; see `mlxsteer.formats.gguf`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxsteer.formats import gguf
from mlxsteer.interventions.base import Compose, Intervention
from mlxsteer.interventions.gates import Keep
from mlxsteer.interventions.operators import AddVector
from mlxsteer.positions import Position
from mlxsteer.sites import Site
from mlxsteer.steering import Steering
from mlxsteer.vectors import SteeringVector

if TYPE_CHECKING:
    from mlxsteer.model import InterpretableModel


class CannotExport(ValueError):
    """An intervention that a control vector doesn't equal, with the reason and the form that would work."""


@dataclass(frozen=True, eq=False)
class ControlVector:
    """What a control vector holds.

    Attributes:
        path: the file; None where none was written.
        vector: its directions, strengths folded in: what is added behind each block at scale 1.
    """

    path: Path | None
    vector: SteeringVector

    @property
    def layers(self) -> list[int]:
        """The blocks that it acts behind, counted from 0."""
        return self.vector.layers

    def __str__(self) -> str:
        layers = f"layers {', '.join(map(str, self.layers))}" if len(self.layers) > 1 else f"layer {self.layers[0]}"
        use = f"llama-cli -m MODEL.gguf --control-vector-scaled {self.path}:1" if self.path else "nothing written"
        return f"a control vector of {layers}, width {self.vector.width}, strengths folded in; {use}."


def export_control_vector(
    model: InterpretableModel,
    interventions: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    dry_run: bool = False,
) -> ControlVector:
    """Write interventions as a control vector for llama.cpp's ``--control-vector-scaled FILE:1``.

    direction.N = Σ s·v over the ``add_vector`` at ``layers.N``, float32. llama.cpp adds it, times the scale, to what
    block N (from 0) hands on, at every token of prompt and answer; source: `mlxsteer.formats.gguf`.

    Args:
        model: the model that the interventions are for.
        interventions: key → `add_vector`, or a list of them, at ``layers.N`` with N ≥ 1, one strength each, at every
            token; such as ``vector.at({5: 2.0}, unit="residual")`` or ``choice.interventions``.
        path: a file name ending in ``.gguf``; a file that is there is replaced.
        dry_run: check all of it, and write nothing.

    Returns:
        What it holds, and how it is used.

    Raises:
        CannotExport: a control vector can't do the same; with the reason and the form that would work.
        UnknownKey: a key names no place.
        ValueError: the name doesn't end in ``.gguf``, or every strength is 0.
        FileNotFoundError: there is no such folder.

    Example:
        >>> import mlxsteer as ms
        >>> model = ms.InterpretableModel("pocket")
        >>> steer = {"layers.4": ms.interventions.add_vector([0.5] * 256, strength=2.0)}
        >>> ms.export_control_vector(model, steer, "cheerful.gguf", dry_run=True).layers
        [4]
    """
    target = Path(path).expanduser()
    if target.suffix != ".gguf":
        raise ValueError(f"{target}: a control vector is a .gguf file.")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{target}: there is no folder {target.parent}.")
    sums: dict[int, np.ndarray] = {}
    for site, edit in Steering.of(model._sites, interventions).edits:
        if isinstance(edit, Keep):  # of a gate, which is refused itself
            continue
        for part, strength in _adds(edit, site.key):
            layer, added = _layer(model, site), np.array(part.vector, np.float64) * strength
            sums[layer] = sums.get(layer, 0.0) + added
    kept = {layer: mx.array(row.astype(np.float32)) for layer, row in sorted(sums.items()) if row.any()}
    if not kept:
        raise ValueError("every strength is 0: there is nothing to export.")
    info = {**model.identity, "layers": len(model._sites.blocks), "method": "strengths folded in"}
    vector = SteeringVector(kept, info=info)
    return ControlVector(None if dry_run else gguf.write(vector, target), vector)


def _layer(model: InterpretableModel, site: Site) -> int:
    """The block behind which a place lies.

    Raises:
        CannotExport: it is another place.
    """
    blocks = model._sites.blocks
    block = site.layer is not None and site.module is blocks[site.layer] and site.call is None
    if not block or site.layer is None or site.port != "output" or site.heads:
        near = f"layers.{site.layer}" if site.layer else "layers.1"
        if block and site.port == "input" and site.layer is not None and site.layer > 1:
            near = f"layers.{site.layer - 1}, which is the same place"
        raise CannotExport(
            f"{site.key} can't be exported: a control vector adds behind whole blocks, layers.1 to "
            f"layers.{len(blocks) - 1}. The nearest is {near}."
        )
    if site.layer == 0:
        raise CannotExport(
            "layers.0 can't be exported: llama.cpp adds nothing behind block 0, and refuses a file with direction.0. "
            "The nearest is layers.1."
        )
    return site.layer


def _adds(edit: Intervention, key: str, times: float = 1.0) -> Iterator[tuple[AddVector, float]]:
    """The additions in an intervention, each with its strength in all.

    Raises:
        CannotExport: something in it is no constant addition at every token.
    """
    if isinstance(edit, Compose) and edit.at == Position.of("all") and edit.schedule is None and edit.exclude is None:
        for step in edit.steps:
            yield from _adds(step, key, times * float(edit.strength))
        return
    name = edit.name or type(edit).__name__
    own: Any = edit.strength
    own = own.item() if isinstance(own, mx.array) and own.ndim == 0 else own
    why = ""
    if not isinstance(edit, AddVector):
        others = " ms.bake and ms.export_adapter take ablate, for mlx-lm." if name == "ablate" else ""
        why = f"a control vector adds a constant, as add_vector does, and nothing else.{others}"
    elif edit.preserve_norm:
        why = "with preserve_norm=True the factor differs from token to token. Without it, it can."
    elif edit.at != Position.of("all"):
        why = f"at={edit.at.written()!r}, and llama.cpp adds it at every token. With at='all' it can."
    elif edit.schedule is not None or edit.exclude is not None:
        what = "a schedule" if edit.schedule is not None else "exclude="
        why = f"it has {what}, and llama.cpp adds the same at every token."
    elif not isinstance(own, (int, float)):
        why = f"it has {edit.strengths} strengths, one per row: give one."
    elif edit.vector.ndim != 1:
        why = f"its vector has shape {edit.vector.shape}; one (D,) can."
    if why:
        raise CannotExport(f"{name} at {key} can't be exported: {why}")
    yield edit, float(own) * times  # type: ignore[misc]  # it is an AddVector, or was refused
