"""Pictures, by matplotlib."""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxsteer.interventions.files import write_whole
from mlxsteer.measures.text import text_statistics
from mlxsteer.measures.uncertainty import paired_difference
from mlxsteer.pairs import counted

if TYPE_CHECKING:
    from mlxsteer.choice import Choice
    from mlxsteer.evaluation import Evaluation
    from mlxsteer.generation_sweep import GenerationSweep
    from mlxsteer.measures.effect import Steerability
    from mlxsteer.pair_components import PairComponents
    from mlxsteer.probes import Probe
    from mlxsteer.refusal import RefusalCandidate, RefusalDirection
    from mlxsteer.sweep import Sweep

# Okabe & Ito's colours, told apart by every kind of sight; lines differ in their markers too.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#767676"
_STYLES = ((_ORANGE, "o"), (_BLUE, "s"), (_GREEN, "^"))
_BANDS = len(_STYLES)
"""So many layers are drawn with their intervals; of more, those that reach furthest, and the rest as thin lines."""

_PREFERENCE = "log P(positive) − log P(negative)  (nats)"
_UNITS = {"raw": "vectors", "residual": "residual norms"}


def _figure(**options: Any) -> Any:
    """An empty figure, without a window.

    Raises:
        ImportError: matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'mlxsteer[plot]'.") from error
    figure: Any = Figure(layout=ConstrainedLayoutEngine(w_pad=0.1), **options)  # no label touches the panel beside it
    # Notebooks show figures of pyplot only; this is how they ask anything else for a picture of itself.
    figure._repr_png_ = functools.partial(_png, figure)
    return figure


def _png(figure: Any) -> bytes:
    """The picture for a notebook, without the version of matplotlib in it: drawn again, it is the same file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def _saved(figure: Any, path: str | Path | None) -> Any:
    if path is not None:
        kind = Path(path).suffix.removeprefix(".").lower()
        if kind not in ("png", "pdf", "svg"):
            raise ValueError(f"{path}: a picture is saved as .png, .pdf or .svg.")
        write_whole(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=160))
    return figure


def _plain(axes: Any) -> None:
    """No frame where nothing is read off, and lines that lead the eye."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(axes: Any, title: str | None = None) -> None:
    axes.legend(fontsize="small", title=title, title_fontsize="small", alignment="left", framealpha=0.85,
                edgecolor="none")  # fmt: skip


def _some_ticks(axis: Any, labels: Sequence[str], most: int) -> None:
    """A tick for each label, or for every so many where they would touch."""
    step = -(-len(labels) // most)
    axis.set_ticks(range(0, len(labels), step), list(labels[::step]))


def _written(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _strength_ticks(axes: Any, strengths: Sequence[float]) -> None:
    """A tick at each strength, where there is room for all of them."""
    if len(strengths) <= 9:
        axes.set_xticks(sorted(strengths), [_written(strength) for strength in sorted(strengths)])


# -- lines with intervals ------------------------------------------------------------------------------------------


def _mean_and_band(effect: np.ndarray[Any, Any], strengths: Sequence[float]) -> np.ndarray[Any, Any]:
    """Mean over prompts, and the ends of the 95 % interval of its change from strength 0, (3, strengths).

    The interval is paired, so it has no width at strength 0; it is that of the mean itself where strength 0 wasn't
    among them. What isn't finite is left out; where fewer than two prompts are left there is no interval.
    """
    base = effect[list(strengths).index(0.0)] if 0.0 in strengths else np.zeros(effect.shape[1])
    found = np.full((3, len(strengths)), np.nan)
    for j, row in enumerate(effect):
        kept = np.isfinite(row) & np.isfinite(base)
        if kept.any():
            found[:, j] = row[kept].mean(), np.nan, np.nan
        if kept.sum() > 1:
            change = paired_difference(row[kept], base[kept])
            found[1:, j] = found[0, j] + np.array([change.low, change.high]) - change.value
    return found


def _plot_line(
    axes: Any,
    effect: np.ndarray[Any, Any],
    strengths: Sequence[float],
    colour: str,
    marker: str,
    label: str,
    aside: float | None = None,
    interval: bool = True,
) -> None:
    """A mean over prompts with its 95 % interval.

    Args:
        aside: draw the intervals as bars, so far to the right; as a band unless given, and there are several strengths.
        interval: whether to draw it.
    """
    order = np.argsort(strengths)
    x = np.array(strengths, float)[order] + (aside or 0.0)
    mean, low, high = _mean_and_band(effect, strengths)[:, order]
    axes.plot(x, mean, marker=marker, markersize=5, linewidth=1.8, color=colour, label=label, zorder=3)
    if not interval:
        return
    if aside is None and len(x) > 1:
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, zorder=2)
    else:
        axes.vlines(x, low, high, color=colour, alpha=0.45, linewidth=3, zorder=2)


def _reaching(effect: np.ndarray[Any, Any]) -> list[int]:
    """The few layers whose means reach furthest from least to most, of layers × strengths × prompts, in order."""
    mean = np.where(np.isfinite(effect), effect, 0).sum(axis=2) / np.maximum(np.isfinite(effect).sum(axis=2), 1)
    return sorted(np.argsort(-np.ptp(mean, axis=1), kind="stable")[:_BANDS].tolist())


def _plot_layers(
    axes: Any,
    effect: np.ndarray[Any, Any],
    strengths: Sequence[float],
    layers: Sequence[int],
    shown: Sequence[int],
    *,
    bars: bool = False,
) -> None:
    """Lines of layers × strengths × prompts, those that are `shown` in colour; and intervals.

    As bars they stand side by side, each line's own. Bands would lie over each other: the line that reaches furthest
    has the only one.
    """
    order = np.argsort(strengths)
    others = [i for i in range(len(layers)) if i not in shown]
    for number, i in enumerate(others):
        kept = np.isfinite(effect[i])
        mean = np.where(kept, effect[i], 0).sum(axis=1) / np.where(kept.any(axis=1), kept.sum(axis=1), np.nan)
        axes.plot(np.array(strengths)[order], mean[order], color="#b5b5b5", linewidth=0.9, zorder=1,
                  label=f"{len(others)} other layer{'s' * (len(others) > 1)}" if not number else None)  # fmt: skip
    furthest = max(shown, key=lambda i: float(np.ptp(np.nan_to_num(effect[i]).mean(axis=1))), default=None)
    gap = 0.012 * float(np.ptp(strengths)) if bars else None  # side by side, bars of several layers are told apart
    for number, (i, (colour, marker)) in enumerate(zip(shown, _STYLES, strict=False)):
        aside = None if gap is None else gap * (number - (len(shown) - 1) / 2)
        interval = bars or i == furthest
        _plot_line(axes, effect[i], strengths, colour, marker, f"layer {layers[i]}", aside, interval)
    if 0.0 in strengths and len(strengths) > 1:
        axes.axvline(0, color=_GREY, linewidth=0.8, zorder=0)
    _strength_ticks(axes, strengths)
    _plain(axes)


def _banded(prompts: int, noun: str = "prompt") -> str:
    """What the bands are, for a legend's title."""
    return f"band: 95 % interval, {prompts} {noun}s" if prompts > 1 else f"1 {noun}: no interval"


def plot_sweep(sweep: Sweep, path: str | Path | None = None) -> Any:
    """A sweep's mean effect as a heat map, and each layer's dose–response with 95 % intervals over prompts.

    The intervals are of the change from the unsteered effect, prompt by prompt. Of many layers the three that reach
    furthest have one; the others are thin lines.

    Args:
        sweep: the sweep.
        path: also write it there; PNG, PDF or SVG by suffix.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    mean, order = sweep.mean, np.argsort(sweep.strengths)
    effect = sweep.effect[:, :, sweep.finished]
    figure = _figure(figsize=(10.5, 0.6 + min(max(3.4, 0.24 * len(sweep.layers)), 9)))
    heat, lines = figure.subplots(1, 2)
    strengths = f"strength ({_UNITS[sweep.unit]})"
    nats = sweep.metric.startswith("logprob_difference")
    _plot_heat(figure, heat, sweep, mean, order)
    heat.set(xlabel=strengths, ylabel="layer")
    _plot_layers(lines, effect, sweep.strengths, sweep.layers, _reaching(effect))
    lines.set(xlabel=strengths, ylabel=_PREFERENCE if nats else sweep.metric)
    lines.set_title("mean over prompts", fontsize="medium")
    _legend(lines, _banded(effect.shape[2]))
    return _saved(figure, path)


def _plot_heat(figure: Any, axes: Any, sweep: Sweep, mean: np.ndarray[Any, Any], order: np.ndarray[Any, Any]) -> None:
    """The change of the mean, layers up and strengths across."""
    unsteered = 0.0 in sweep.strengths
    base = mean[:, [sweep.strengths.index(0.0)]] if unsteered else np.full((1, 1), mean.mean())
    reach = float(np.nanmax(np.abs(mean - base))) or 1.0
    # Blue and orange about the unsteered value: told apart by every kind of sight.
    shown = axes.imshow(mean[:, order] - base, cmap="PuOr_r", vmin=-reach, vmax=reach, aspect="auto", origin="lower")
    _some_ticks(axes.xaxis, [_written(sweep.strengths[i]) for i in order], 11)
    _some_ticks(axes.yaxis, [str(layer) for layer in sweep.layers], 24)
    axes.set_title(f"change from {'unsteered' if unsteered else 'the mean of all'}", fontsize="medium")
    figure.colorbar(shown, ax=axes, label="nats" if sweep.metric.startswith("logprob") else sweep.metric)


# -- choices and evaluations -----------------------------------------------------------------------------------------


def plot_choice(choice: Choice, path: str | Path | None = None) -> Any:
    """The layers' effects at equal side effects, and the dose–response on held-out pairs against chance.

    Args:
        choice: the choice.
        path: also write it there; PNG, PDF or SVG by suffix.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    warned = _wrapped(choice.warnings, 150)
    figure = _figure(figsize=(10.5, 4.2 + 0.16 * len(warned)))
    layers, dose = figure.subplots(1, 2)
    single = sorted((c for c in choice.candidates if len(c.strengths) == 1), key=lambda c: next(iter(c.strengths)))
    for layer in choice.strengths:
        layers.axvspan(layer - 0.2, layer + 0.2, color=_ORANGE, alpha=0.2, linewidth=0, label=f"chosen: layer {layer}")
    for candidate in choice.candidates:
        if len(candidate.strengths) > 1:
            label = f"layers {' + '.join(map(str, candidate.strengths))}, {candidate.stage}"
            layers.axhline(candidate.effect, color=_BLUE, linestyle=(0, (4, 2)), linewidth=1.2, label=label)
    for stage, marker, colour, said in (
        ("measured", "o", _ORANGE, "measured"), ("tried", "D", _GREY, "tried: an estimate"),
    ):  # fmt: skip
        some = [(next(iter(c.strengths)), c.effect) for c in single if c.stage == stage]
        if some:
            layers.plot(*zip(*some, strict=True), marker, color=colour, markersize=7, label=said)
    layers.set(xlabel="layer", ylabel="mean shift of the preference (nats)")
    layers.set_title(f"choosing split, at {choice.budget[0]} ≤ {choice.budget[1]:g} nats", fontsize="medium")
    layers.xaxis.get_major_locator().set_params(integer=True)
    low, high = layers.get_ylim()
    layers.set_ylim(min(0, low), max(0, high) * 1.05)
    _plain(layers)
    _legend(layers)
    _plot_dose(dose, choice.evidence.curve, choice.evidence.nulls)
    dose.set_title(
        f"report split, {choice.evidence.pairs} held-out pairs: shift {choice.evidence.shift} nats", fontsize="medium"
    )
    _warn(figure, warned)
    return _saved(figure, path)


def _wrapped(warnings: Iterable[str], width: int) -> list[str]:
    """Warnings in lines of at most `width` characters."""
    return [line for warning in warnings for line in textwrap.wrap(f"Warning: {warning}", width)]


def _warn(figure: Any, lines: list[str]) -> None:
    """Write warnings under a picture."""
    if lines:
        figure.supxlabel("\n".join(lines), fontsize="small", x=0.01, ha="left", color="#9b2c2c")


def plot_evaluation(found: Evaluation, path: str | Path | None = None) -> Any:
    """Dose–response against chance, pair by pair, and what becomes of the text.

    Args:
        found: the evaluation.
        path: also write it there; PNG, PDF or SVG by suffix.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    figure = _figure(figsize=(12.5, 4))
    dose, pairs, text = figure.subplots(1, 3)
    _plot_dose(dose, found.curve, found.nulls)
    dose.set_title(f"dose–response: shift {found.shift} nats", fontsize="medium")
    order = np.argsort(found.base)
    pairs.axhline(0, color=_GREY, linewidth=0.8)
    pairs.vlines(range(len(order)), found.base[order], found.steered[order], color="#b5b5b5", linewidth=1, zorder=1)
    pairs.plot(found.base[order], "s", color=_BLUE, label="unsteered", markersize=4)
    pairs.plot(found.steered[order], "o", color=_ORANGE, label="steered", markersize=4)
    pairs.set(xlabel="pair, by its unsteered preference", ylabel=_PREFERENCE)
    pairs.set_title("pair by pair", fontsize="medium")
    _plain(pairs)
    _legend(pairs)
    pairs.xaxis.get_major_locator().set_params(integer=True)
    _plot_text(text, found)
    return _saved(figure, path)


def _plot_text(axes: Any, found: Evaluation) -> None:
    """Statistics of steered text as multiples of those of unsteered text."""
    names = ["perplexity", "distinct 1", "distinct 2", "entropy", "length", "longest repeat"]
    own, steered = ([s.distinct_1, s.distinct_2, s.entropy, s.length, s.longest_repeat]
                    for s in (found.own_text, found.steered_text))  # fmt: skip
    ratios = [found.perplexity_ratio, *(b / a if a else np.nan for a, b in zip(own, steered, strict=True))]
    axes.barh(range(len(names)), [r - 1 for r in ratios], left=1, height=0.6,
              color=[_ORANGE if r > 1 else _BLUE for r in ratios])  # fmt: skip
    for row, ratio in enumerate(ratios):
        if np.isfinite(ratio):
            axes.annotate(f"{ratio:.2f}", (ratio, row), (4 if ratio >= 1 else -4, 0), textcoords="offset points",
                          va="center", ha="left" if ratio >= 1 else "right", fontsize="small")  # fmt: skip
    axes.margins(x=0.15)
    axes.axvline(1, color=_GREY, linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="steered / unsteered")
    axes.set_title("generated text", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)


def _plot_dose(axes: Any, curve: Steerability, nulls: Sequence[float]) -> None:
    """A mean dose–response with its 95 % interval, and the shifts of random vectors beside the full strength."""
    strengths = curve.strengths.tolist()
    axes.axvline(0, color=_GREY, linewidth=0.8)
    _plot_line(axes, curve.effect, strengths, _ORANGE, "o", "steering, mean")
    if nulls:
        base = curve.mean_curve[int(np.argmin(np.abs(curve.strengths)))]
        beside = max(strengths) + 0.06 * np.ptp(strengths)  # not on the curve, which they would hide
        axes.plot([beside] * len(nulls), base + np.array(nulls), "_", color=_GREY, markersize=14,
                  label=f"{len(nulls)} random vectors, full strength")  # fmt: skip
    axes.set(xlabel="multiple of the strength", ylabel=_PREFERENCE)
    _strength_ticks(axes, strengths)
    _plain(axes)
    _legend(axes, _banded(curve.effect.shape[1], "pair"))


# -- generated texts -------------------------------------------------------------------------------------------------


def plot_generation_sweep(sweep: GenerationSweep, path: str | Path | None = None) -> Any:
    """What becomes of the texts as the strength grows: score, length, variety and repeats, a panel for each.

    Means over prompts, with 95 % intervals of the change from strength 0, prompt by prompt; the samples of a prompt
    count as one. Of many layers the three that reach furthest have an interval; the others are thin lines.

    Args:
        sweep: the sweep.
        path: also write it there; PNG, PDF or SVG by suffix.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    panels = _text_panels(sweep)
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    figure = _figure(figsize=(5.4 * columns, 0.8 + 2.8 * rows))
    every = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    shown = _reaching(next(iter(panels.values())))
    for axes, (name, effect) in zip(every, panels.items(), strict=False):
        _plot_layers(axes, effect, sweep.strengths, sweep.layers, shown, bars=True)
        axes.set(ylabel=name, xlabel=_strength_axis(sweep))
        if name != _SCORE:  # counts and shares begin at 0: what looks large is large
            axes.set_ylim(0, max(axes.get_ylim()[1], 1.05))
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    _mark_longest(every[list(panels).index(_LENGTH)], sweep.record.get("max_tokens"))
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small", frameon=False)
    figure.suptitle(_texts_of(sweep), fontsize="medium")
    return _saved(figure, path)


_SCORE, _LENGTH = "score", "length (tokens)"


def _text_panels(sweep: GenerationSweep) -> dict[str, np.ndarray[Any, Any]]:
    """Name → layers × strengths × prompts, the mean over samples; the one that says most first."""
    names = {_LENGTH: "length", "distinct pairs of tokens (share)": "distinct_2",
             "longest repeat (tokens)": "longest_repeat"}  # fmt: skip
    found = {name: np.full(sweep.texts.shape[:3], np.nan) for name in names}
    for index in np.ndindex(*sweep.texts.shape[:3]):
        statistics = text_statistics([text.tokens for text in sweep.texts[index]])
        for name, attribute in names.items():
            found[name][index] = getattr(statistics, attribute)
    return found if sweep.scored is None else {_SCORE: sweep.scored.mean(axis=-1), **found}


def _texts_of(sweep: GenerationSweep) -> str:
    """What was generated, and what the bars are, in a line."""
    *_, prompts, samples = sweep.texts.shape
    model = f"{sweep.record['model']}: " if "model" in sweep.record else ""
    each = f", {samples} samples of each" if samples > 1 else ""
    return f"{model}{counted(prompts, 'prompt')}{each}; {'bars: 95 % intervals' if prompts > 1 else 'no intervals'}"


def _strength_axis(sweep: GenerationSweep) -> str:
    done = sweep.record.get("intervention", "add_vector")
    return f"strength ({_UNITS[sweep.unit]})" if done == "add_vector" else f"strength of {done}"


def _mark_longest(axes: Any, most: Any) -> None:
    """A line at the length where texts were cut off."""
    if isinstance(most, int):
        axes.axhline(most, color=_GREY, linestyle=":", linewidth=1)
        axes.annotate("max_tokens", (1, most), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", fontsize="x-small", color=_GREY)  # fmt: skip


# -- the refusal direction ------------------------------------------------------------------------------------------


def plot_refusal(found: RefusalDirection, path: str | Path | None = None) -> Any:
    """Bypass, induce and KL of every candidate, positions up and layers across; the chosen one framed.

    Candidates that were ruled out are hatched in grey; the scale of the KL ends at the largest of the others.

    Args:
        found: the direction, with all that were tried.
        path: also write it there; PNG, PDF or SVG by suffix.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    layers = sorted({one.layer for one in found.candidates})
    positions = sorted({one.position for one in found.candidates})
    figure = _figure(figsize=(max(8.4, 2.2 + 0.34 * len(layers)), 1.2 + 3 * (0.75 + 0.3 * len(positions))))
    every = figure.subplots(3, 1, sharex=True)
    before, calm = (_written(round(score, 1)) for score in found.base)
    panels = (
        ("bypass", f"bypass: refusal of harmful requests, direction taken out (unsteered {before}); low is good"),
        ("induce", f"induce: refusal of harmless requests, direction added (unsteered {calm}); above 0 is needed"),
        ("kl", "KL on harmless requests, direction taken out; low is good"),
    )
    for axes, (name, title) in zip(every, panels, strict=True):
        _plot_candidates(figure, axes, found.candidates, name, layers, positions)
        axes.set_title(title, fontsize="medium", loc="left")
        axes.set(ylabel="token")
    every[-1].set(xlabel="layer")
    best = found.candidates[0]
    figure.suptitle(f"framed: layer {best.layer}, token {_written(best.position)}; hatched: ruled out")
    return _saved(figure, path)


def _plot_candidates(
    figure: Any, axes: Any, candidates: Sequence[RefusalCandidate], name: str, layers: list[int], positions: list[int]
) -> None:
    """One number of every candidate as a heat map."""
    from matplotlib.patches import Rectangle

    grid = np.full((len(positions), len(layers)), np.nan)
    for one in candidates:
        grid[positions.index(one.position), layers.index(one.layer)] = getattr(one, name)
    # Scores lie about 0, where refusing is as likely as not; a divergence begins there, and only the passing count.
    kept = [abs(getattr(one, name)) for one in candidates if one.passes or name != "kl"]
    reach = max((value for value in kept if np.isfinite(value)), default=0.0) or 1.0
    scale: dict[str, Any] = {"cmap": "PuOr_r", "vmin": -reach, "vmax": reach}
    if name == "kl":
        scale = {"cmap": "Blues", "vmin": 0, "vmax": reach}
    shown = axes.imshow(grid, aspect="auto", origin="lower", **scale)
    for one in candidates:
        corner = layers.index(one.layer) - 0.5, positions.index(one.position) - 0.5
        if not one.passes:
            axes.add_patch(
                Rectangle(corner, 1, 1, facecolor="#d9d9d9", alpha=0.75, edgecolor="#8a8a8a", hatch="///", linewidth=0)
            )
    best = candidates[0]
    corner = layers.index(best.layer) - 0.5, positions.index(best.position) - 0.5
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=2.5, zorder=5))
    _some_ticks(axes.xaxis, [str(layer) for layer in layers], 32)
    _some_ticks(axes.yaxis, [_written(position) for position in positions], 12)
    kind = {"label": "nats", "extend": "max"} if name == "kl" else {"label": "log odds"}
    figure.colorbar(shown, ax=axes, pad=0.01, **kind)


def plot_heads(
    grid: np.ndarray[Any, Any], title: str, unit: str, framed: Sequence[tuple[int, int]], path: str | Path | None
) -> Any:
    """A number of every head as a heat map, layers upwards; zero is white, heads that there aren't are grey.

    Args:
        grid: (layers, heads); NaN where there is no head.
        title: what it shows.
        unit: of the numbers.
        framed: (layer, head) of the heads to be framed.
        path: also write it there, as PNG, PDF or SVG by suffix.
    """
    rows, columns = ([str(number) for number in range(count)] for count in grid.shape)
    return plot_grid(grid, rows, columns, ("layer", "head"), title, unit, path, framed=framed)


def plot_grid(
    grid: np.ndarray[Any, Any],
    rows: Sequence[str],
    columns: Sequence[str],
    axes: tuple[str, str],
    title: str,
    unit: str,
    path: str | Path | None,
    *,
    rest: float = 0.0,
    framed: Sequence[tuple[int, int]] = (),
) -> Any:
    """Numbers as a heat map, the first row at the bottom; the value at rest is white, what there isn't is grey.

    Args:
        grid: (rows, columns); NaN where there is nothing.
        rows, columns: their names; long ones of columns are written upwards.
        axes: what rows and columns are.
        title: what it shows.
        unit: of the numbers.
        path: also write it there, as PNG, PDF or SVG by suffix.
        rest: the value where nothing happens.
        framed: (row, column) of what is to be framed.
    """
    from matplotlib.patches import Rectangle

    long = max(map(len, columns)) > 3
    size = min(14.0, max(4.6, 2.2 + 0.34 * len(columns))), min(14.0, max(3.2, 1.4 + 0.3 * len(rows) + 0.8 * long))
    figure = _figure(figsize=size)
    panel = figure.subplots()
    panel.set_facecolor("#d9d9d9")
    finite = np.abs(grid - rest)[np.isfinite(grid)]
    reach = float(finite.max()) if finite.size and finite.any() else 1.0
    shown = panel.imshow(
        np.ma.masked_invalid(grid), aspect="auto", origin="lower", cmap="PuOr_r", vmin=rest - reach, vmax=rest + reach
    )
    for row, column in framed:
        panel.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2, zorder=5)
        )
    _some_ticks(panel.xaxis, [name.replace("$", r"\$") for name in columns], 40 if long else 32)
    _some_ticks(panel.yaxis, rows, 40 if long else 32)
    if long:
        panel.tick_params(axis="x", rotation=90)
    panel.set(xlabel=axes[1], ylabel=axes[0])
    panel.set_title("\n".join(line for part in title.split("\n") for line in textwrap.wrap(part, int(11 * size[0]))),
                    fontsize="medium", loc="left")  # fmt: skip
    figure.colorbar(shown, ax=panel, pad=0.02, label=unit)
    return _saved(figure, path)


# -- probes ----------------------------------------------------------------------------------------------------------


def plot_probe(found: Probe, path: str | Path | None = None) -> Any:
    """AUROC by layer on held-out texts, with 95 % intervals, and the band in which permuted labels lie.

    Args:
        found: the probe.
        path: also write it there; PNG, PDF or SVG by suffix.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    warned = _wrapped(found.warnings, 100)
    figure = _figure(figsize=(7.2, 4.2 + 0.16 * len(warned)))
    axes = figure.subplots()
    layers, probes = list(found.layers), list(found.layers.values())
    bands = [one.chance for one in probes if one.chance is not None]
    if bands:
        edges = np.array([layers[0] - 0.5, *(np.array(layers[:-1]) + np.diff(layers) / 2), layers[-1] + 0.5])
        low, high = ([*ends, ends[-1]] for ends in zip(*bands, strict=True))
        axes.fill_between(edges, low, high, step="post", color=_GREY, alpha=0.2, linewidth=0,
                          label="95 % of permuted labels")  # fmt: skip
    axes.axhline(0.5, color=_GREY, linewidth=0.8)
    axes.axvspan(found.best - 0.2, found.best + 0.2, color=_ORANGE, alpha=0.2, linewidth=0,
                 label=f"chosen: layer {found.best}")  # fmt: skip
    axes.vlines(layers, [one.auroc.low for one in probes], [one.auroc.high for one in probes], color=_ORANGE,
                alpha=0.45, linewidth=3)  # fmt: skip
    axes.plot(layers, [one.auroc.value for one in probes], color=_ORANGE, marker="o", markersize=5, linewidth=1.8,
              label="report split, 95 % interval")  # fmt: skip
    axes.plot(layers, [one.chosen_by for one in probes], "s", color=_BLUE, markersize=5, markerfacecolor="none",
              label="choose split")  # fmt: skip
    axes.set(xlabel="layer", ylabel="AUROC", ylim=(min(0.4, axes.get_ylim()[0]), 1.02))
    axes.set_title(f"{found.method} probes, held-out {found.info.get('report', 'texts')}", fontsize="medium")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _plain(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize="small", frameon=False)
    _warn(figure, warned)
    return _saved(figure, path)


# -- contrast pairs ----------------------------------------------------------------------------------------------------

_PANELS = 12


def plot_pairs(found: PairComponents, path: str | Path | None = None) -> Any:
    """Both sides of contrast pairs on their first two principal components, a panel for each layer.

    Args:
        found: the components; of more than twelve layers, twelve evenly spaced ones are drawn.
        path: also write it there; PNG, PDF or SVG by suffix.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    every = list(found.points)
    layers = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, min(_PANELS, len(every))).round().astype(int))]
    across = min(4, len(layers))
    down = -(-len(layers) // across)
    figure = _figure(figsize=(2.6 * across + 0.6, 2.7 * down + 0.7))
    panels = np.atleast_1d(figure.subplots(down, across)).ravel()
    for panel in panels[len(layers) :]:
        panel.set_axis_off()
    for panel, layer in zip(panels, layers, strict=False):
        (first, second), cosine = found.explained[layer], found.cosine[layer]
        for side, (colour, marker), name in zip(found.points[layer], _STYLES, ("positive", "negative"), strict=False):
            panel.scatter(*side.T, s=14, color=colour, marker=marker, alpha=0.6, linewidths=0, label=name)
        panel.set_title(f"layer {layer}; cosine {cosine:.2f}", fontsize="medium")
        panel.set(
            xlabel=f"first component, {first:.0%}", ylabel=f"second component, {second:.0%}", xticks=[], yticks=[]
        )
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize="small", frameon=False,
                  title="principal components of both sides, and their share of the variance; cosine of the first with "
                  "the mean difference" if across > 2 else None, title_fontsize="small")  # fmt: skip
    return _saved(figure, path)
