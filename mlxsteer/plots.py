"""Pictures, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxsteer.interventions.files import write_whole

if TYPE_CHECKING:
    from mlxsteer.evaluation import Evaluation
    from mlxsteer.measures.effect import Steerability
    from mlxsteer.selection import Choice
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


def plot_choice(choice: Choice, path: str | Path | None = None) -> Any:
    """The layers' effects at equal side effects, and the dose–response on held-out pairs against chance.

    Args:
        choice: the choice.
        path: also write it there; PNG, PDF or SVG by suffix.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    figure = _figure(figsize=(10, 4))
    layers, dose = figure.subplots(1, 2)
    single = sorted((c for c in choice.candidates if len(c.strengths) == 1), key=lambda c: next(iter(c.strengths)))
    for stage, marker, colour in (("measured", "o", _ORANGE), ("tried", "s", _GREY)):
        some = [(next(iter(c.strengths)), c.effect) for c in single if c.stage == stage]
        if some:
            layers.plot(*zip(*some, strict=True), marker, color=colour, markersize=8, label=stage)
    for candidate in choice.candidates:
        if len(candidate.strengths) > 1:
            label = "layers " + " + ".join(map(str, candidate.strengths))
            layers.axhline(candidate.effect, color=_BLUE, linestyle=":", label=label)
    for layer in choice.strengths:
        layers.axvline(layer, color=_ORANGE, alpha=0.25, linewidth=10, label=f"chosen: layer {layer}")
    layers.set(xlabel="layer", ylabel="shift of the preference (nats)")
    layers.set_title(f"choosing split, at {choice.budget[0]} ≤ {choice.budget[1]:g}")
    layers.xaxis.get_major_locator().set_params(integer=True)
    layers.set_ylim(min(0, layers.get_ylim()[0]), max(0, layers.get_ylim()[1]))
    layers.legend(fontsize="small")
    _plot_curve(dose, choice.evidence.curve, choice.evidence.nulls)
    dose.set_title(f"{choice.evidence.pairs} held-out pairs: {choice.evidence.shift} nats", fontsize="medium")
    if choice.warnings:
        figure.supxlabel("\n".join(f"Warning: {warning}" for warning in choice.warnings), fontsize="small", x=0.01,
                         ha="left", color="#9b2c2c")  # fmt: skip
    return _saved(figure, path)


def plot_evaluation(found: Evaluation, path: str | Path | None = None) -> Any:
    """Dose–response against chance, pair by pair, and what becomes of the text.

    Args:
        found: the evaluation.
        path: also write it there; PNG, PDF or SVG by suffix.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    figure = _figure(figsize=(11, 3.6))
    dose, pairs, text = figure.subplots(1, 3)
    _plot_curve(dose, found.curve, found.nulls)
    dose.set_title("dose–response", fontsize="medium")
    order = np.argsort(found.base)
    pairs.axhline(0, color=_GREY, linewidth=0.8)
    pairs.vlines(range(len(order)), found.base[order], found.steered[order], color=_GREY, linewidth=1)
    pairs.plot(found.base[order], "o", color=_BLUE, label="unsteered", markersize=4)
    pairs.plot(found.steered[order], "o", color=_ORANGE, label="steered", markersize=4)
    pairs.set(xlabel="pair", ylabel="log P(positive) − log P(negative)")
    pairs.set_title("pair by pair", fontsize="medium")
    pairs.legend(fontsize="small")
    pairs.xaxis.get_major_locator().set_params(integer=True)
    names = ["distinct 1", "distinct 2", "entropy", "length", "longest repeat"]
    own, steered = ([s.distinct_1, s.distinct_2, s.entropy, s.length, s.longest_repeat]
                    for s in (found.own_text, found.steered_text))  # fmt: skip
    ratios = [b / a if a else np.nan for a, b in zip(own, steered, strict=True)]
    names, ratios = ["perplexity", *names], [found.perplexity_ratio, *ratios]
    text.barh(range(len(names)), [r - 1 for r in ratios], left=1, color=[_ORANGE if r > 1 else _BLUE for r in ratios])
    text.axvline(1, color=_GREY, linewidth=0.8)
    text.set_yticks(range(len(names)), names)
    text.invert_yaxis()
    text.set(xlabel="steered / unsteered")
    text.set_title("generated text", fontsize="medium")
    return _saved(figure, path)


_BLUE, _ORANGE, _GREY = "#2b6cb0", "#dd6b20", "#8a8a8a"


def _plot_curve(axes: Any, curve: Steerability, nulls: Sequence[float]) -> None:
    """A mean dose–response with every prompt's, and the shifts of random vectors at the full strength."""
    order = np.argsort(curve.strengths)
    axes.axvline(0, color=_GREY, linewidth=0.8)
    axes.plot(curve.strengths[order], curve.mean_curve[order], "o-", color=_ORANGE, label="steering, mean over pairs")
    if nulls:
        base = curve.mean_curve[int(np.argmin(np.abs(curve.strengths)))]
        axes.plot([curve.strengths.max()] * len(nulls), base + np.array(nulls), "_", color=_GREY, markersize=14,
                  label=f"{len(nulls)} random vectors")  # fmt: skip
    axes.set(xlabel="multiple of the strength", ylabel="log P(positive) − log P(negative)")
    axes.legend(fontsize="small")
