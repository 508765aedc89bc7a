"""Pictures, by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxsteer.interventions.files import write_whole

if TYPE_CHECKING:
    from mlxsteer.sweep import Sweep


def _figure(**options: Any) -> Any:
    """An empty figure, without a window.

    Raises:
        ImportError: matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'mlxsteer[plot]'.") from error
    return Figure(layout="constrained", **options)


def _saved(figure: Any, path: str | Path | None) -> Any:
    if path is not None:
        kind = Path(path).suffix.removeprefix(".").lower()
        if kind not in ("png", "pdf", "svg"):
            raise ValueError(f"{path}: a picture is saved as .png, .pdf or .svg.")
        write_whole(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=160))
    return figure


def plot_sweep(sweep: Sweep, path: str | Path | None = None) -> Any:
    """A sweep's mean effect as a heat map, and each layer's dose–response.

    Args:
        sweep: the sweep.
        path: also write it there; PNG, PDF or SVG by suffix.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    mean, order = sweep.mean, np.argsort(sweep.strengths)
    figure = _figure(figsize=(10, 0.5 + max(3.2, 0.28 * len(sweep.layers))))
    heat, lines = figure.subplots(1, 2)
    base = mean[:, [sweep.strengths.index(0.0)]] if 0.0 in sweep.strengths else np.full((1, 1), mean.mean())
    reach = float(np.nanmax(np.abs(mean - base))) or 1.0
    # Blue and orange about the unsteered value: told apart by every kind of sight.
    shown = heat.imshow(mean[:, order] - base, cmap="PuOr_r", vmin=-reach, vmax=reach, aspect="auto", origin="lower")
    heat.set_xticks(range(len(order)), [f"{sweep.strengths[i]:g}" for i in order])
    heat.set_yticks(range(len(sweep.layers)), [str(layer) for layer in sweep.layers])
    unit = {"raw": "vectors", "residual": "residual norms"}[sweep.unit]
    heat.set(xlabel=f"strength ({unit})", ylabel="layer", title="effect, change from unsteered")
    figure.colorbar(shown, ax=heat)
    colours = figure_colours(len(sweep.layers))
    for layer, row, colour in zip(sweep.layers, mean, colours, strict=True):
        lines.plot(np.array(sweep.strengths)[order], row[order], marker="o", color=colour, label=f"layer {layer}")
    lines.set(xlabel=f"strength ({unit})", title=f"{sweep.metric.replace('_', ' ')}, mean over prompts")
    if len(sweep.layers) <= 12:
        lines.legend(fontsize="small")
    return _saved(figure, path)


def figure_colours(count: int) -> list[Any]:
    """Colours from dark to light, early layers dark."""
    from matplotlib import colormaps

    scale = colormaps["viridis"]
    return [scale(0.9 * i / max(count - 1, 1)) for i in range(count)]
