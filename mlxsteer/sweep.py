"""Layer × strength grids: one clean pass, and from each layer on only what the edit changes."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from mlxsteer.continuation import Continuation, first_edited
from mlxsteer.interventions import create
from mlxsteer.interventions.base import Intervention, number
from mlxsteer.interventions.files import write_whole
from mlxsteer.model import InterpretableModel
from mlxsteer.positions import At, Position
from mlxsteer.progress import Step, reporting
from mlxsteer.questions import Metric, Question, groups, question_of
from mlxsteer.vectors import SteeringVector

Maker: TypeAlias = "str | Callable[[mx.array, list[float]], Intervention]"
"""The name of a registered intervention that takes one direction, or a callable from a direction and one strength per
row to an intervention."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """The effect of a steering vector over layers, strengths and prompts.

    Attributes:
        effect: layers × strengths × prompts; NaN where the sweep was interrupted.
        layers: the layers of the first axis.
        strengths: the strengths of the second axis.
        unit: what a strength of 1 is: ``"raw"``, the vector; ``"residual"``, the layer's median norm.
        metric: what was measured.
        record: model, vector, data, positions and versions, to say what was measured.
    """

    effect: np.ndarray[Any, Any]
    layers: list[int]
    strengths: list[float]
    unit: str = "raw"
    metric: str = "logprob_difference"
    record: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        layers, strengths, prompts = self.effect.shape
        return f"Sweep({layers} layers × {strengths} strengths × {prompts} prompts)"

    @property
    def mean(self) -> np.ndarray[Any, Any]:
        """The mean effect over prompts, layers × strengths."""
        mean: np.ndarray[Any, Any] = self.effect.mean(axis=2)
        return mean

    def table(self) -> str:
        """The mean effect over prompts as a table in plain text; layers down, strengths across."""
        console = Console(width=100, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def __rich__(self) -> Table:
        """The same for a terminal that shows colours."""
        mean = self.mean
        table = Table(
            title=f"{_TITLES.get(self.metric, self.metric)}, mean over prompts; strength in {_UNITS[self.unit]}"
        )
        table.add_column("layer", justify="right")
        for strength in self.strengths:
            table.add_column(f"{strength:+g}" if strength else "0", justify="right")
        low, high = np.nanmin(mean), np.nanmax(mean)
        for layer, row in zip(self.layers, mean, strict=True):
            cells = [f"[{_colour(value, low, high)}]{value:+.2f}[/]" for value in row]
            table.add_row(str(layer), *cells)
        return table

    def best(self) -> tuple[int, float]:
        """The layer and strength s that move the effect most in both directions, at +s and at −s.

        Raises:
            ValueError: no strength was swept together with its negative and 0.
        """
        mean = self.mean
        at = {strength: i for i, strength in enumerate(self.strengths)}
        both = [s for s in self.strengths if s > 0 and -s in at and 0.0 in at]
        if not both:
            raise ValueError("best() needs a strength together with its negative and 0 in the sweep.")
        moved = {
            (layer, s): min(row[at[s]] - row[at[0.0]], row[at[0.0]] - row[at[-s]])
            for layer, row in zip(self.layers, mean, strict=True)
            for s in both
        }
        return max(moved, key=lambda choice: moved[choice])

    def to_json(self, path: str | Path | None = None) -> str:
        """The sweep as JSON; with a path, also written there, whole or not at all."""
        effect = [[[None if np.isnan(x) else float(x) for x in row] for row in rows] for rows in self.effect]
        data = {"metric": self.metric, "unit": self.unit, "layers": self.layers, "strengths": self.strengths,
                "effect": effect, "record": dict(self.record)}  # fmt: skip
        text = json.dumps(data, indent=1)
        if path is not None:
            write_whole(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
        return text

    @classmethod
    def from_json(cls, path: str | Path) -> Sweep:
        """Read what `to_json` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no sweep.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            effect = np.array(data["effect"], dtype=np.float64)
            made = cls(effect, data["layers"], data["strengths"], data["unit"], data["metric"], data["record"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no sweep ({error}).") from error
        if effect.ndim != 3 or effect.shape[:2] != (len(made.layers), len(made.strengths)):
            raise ValueError(f"{path} holds no sweep: its effect has shape {effect.shape}.")
        return made

    def plot(self, path: str | Path | None = None) -> Any:
        """A heat map of the mean effect, and the dose–response of each layer; a matplotlib figure.

        Args:
            path: also write it there, as PNG, PDF or SVG by suffix.
        """
        from mlxsteer.plots import plot_sweep

        return plot_sweep(self, path)


_TITLES = {"logprob_difference": "log P(positive) − log P(negative) in nats"}
_UNITS = {"raw": "vectors", "residual": "residual norms"}


def _colour(value: float, low: float, high: float) -> str:
    """Blue for low, orange for high, plain between: told apart by every kind of sight."""
    share = (value - low) / max(high - low, 1e-9)
    if share < 0.25:
        return "blue"
    return "dark_orange" if share > 0.75 else "default"


# -- what is tried -------------------------------------------------------------------------------------------------


def _directions(
    model: InterpretableModel, vector: SteeringVector | Mapping[int, Any], layers: Any, unit: str
) -> tuple[SteeringVector, list[int]]:
    """The vector and the layers to sweep.

    Raises:
        TypeError, ValueError: no vector, no such layer, no norms for the unit.
        KeyError: the vector lacks a layer.
    """
    if unit not in _UNITS:
        raise ValueError(f"unit is 'raw' or 'residual', not {unit!r}.")
    if not isinstance(vector, SteeringVector):
        if not isinstance(vector, Mapping):
            raise TypeError(f"sweep takes a SteeringVector or a dict from layers to directions, not {vector!r}.")
        vector = SteeringVector(vector)
    if vector.positions is not None:
        raise ValueError("this vector has a direction per position; a sweep takes one direction per layer.")
    vector.check(model)
    if isinstance(layers, str) and layers != "all":
        raise ValueError(f"layers are 'all', a layer, or a list of layers, not {layers!r}.")
    wanted = list(vector) if isinstance(layers, str) else [int(layer) for layer in np.atleast_1d(np.asarray(layers))]
    for layer in wanted:
        vector.at(layer, unit=unit)  # type: ignore[arg-type]  # refuse what is missing before anything runs
    return vector, wanted


def _maker(
    intervention: Maker, vector: SteeringVector, at: At, unit: str
) -> Callable[[int, list[float]], Intervention]:
    """(layer, a strength per row) → the intervention there."""

    def make(layer: int, rows: list[float]) -> Intervention:
        if intervention == "add_vector":
            return vector.at(layer, rows, at, unit=unit)[vector.key(layer)]  # type: ignore[arg-type]
        if callable(intervention):
            return intervention(vector[layer], rows)
        parameter = _DIRECTION.get(intervention, "direction")
        return create(intervention, **{parameter: vector[layer]}, strength=rows, at=at)

    return make


def check_positions(made: Intervention, layer: int, at: At) -> None:
    """Refuse an intervention that acts elsewhere than where a sweep takes it to act: the rest runs once, unedited.

    Raises:
        ValueError: with where it acts.
    """
    for part in made.parts():
        if part.at != Position.of(at):
            raise ValueError(
                f"the intervention at layer {layer} acts at={part.at.written()!r}, and at={at!r} was asked for: make "
                f"it act there, or ask for at={part.at.written()!r}."
            )


_DIRECTION = {"ablate": "directions", "replace_with": "value", "mean_replace": "mean"}


def sweep(
    model: InterpretableModel,
    vector: SteeringVector | Mapping[int, Any],
    pairs: Iterable[Any],
    *,
    layers: str | int | Sequence[int] = "all",
    strengths: float | Sequence[float] = (-1.0, -0.5, 0.0, 0.5, 1.0),
    at: At = -1,
    unit: Literal["raw", "residual"] = "residual",
    intervention: Maker = "add_vector",
    metric: Metric = "logprob_difference",
    normalize: Literal["token"] | None = None,
    chat: bool = False,
    batch_tokens: int = 4096,
    checkpoint: str | Path | None = None,
    progress: bool | Step | None = True,
) -> Sweep:
    """Steer at each layer with each strength, and measure what it does.

    One clean pass; then every layer goes on from the clean outputs of the blocks before it, which aren't run again,
    with the strengths as rows of the batch. Strength 0 is the clean pass. Where only tokens from some position on are
    steered (``at=-1``, the default), those before it run once. The head runs where a token counts. Families whose
    blocks can't be replayed take a pass of their own for every layer. The logits are those of the plain way.

    Args:
        model: the model.
        vector: one direction per layer, or a dict from layers to directions.
        pairs: contrast pairs; or prompts (texts, token ids, chats), with a metric for prompts.
        layers: which layers, or ``"all"`` that the vector has.
        strengths: in the unit.
        at: which tokens; a pair's prompt is the prompt, its completion counts as generated.
        unit: ``"residual"``: a strength of 1 adds the direction with the layer's median norm, so that strengths mean
            the same at every layer; ``"raw"``: it adds the vector as it is. For ``"add_vector"`` only.
        intervention: what is done with the direction; or a callable.
        metric: what is measured.
        normalize: ``"token"`` divides a completion's log-probability by its number of tokens.
        chat: prompts are a user's messages.
        batch_tokens: the most tokens in one batch, padding and strengths included; memory is bounded by it.
        checkpoint: a JSON file that keeps what is done, and from which the same sweep goes on.
        progress: True for a bar on a terminal, or a function that is called with the number of steps done and in all.

    Returns:
        A `Sweep`.

    Raises:
        TypeError: no pairs, prompts, vector or metric.
        ValueError: there are no pairs or no strengths; the vector doesn't fit; the checkpoint is of another sweep.
        KeyError: the vector lacks a layer.
    """
    strong = [number(s, "a strength") for s in np.atleast_1d(np.asarray(strengths))]
    if not strong:
        raise ValueError("a sweep needs at least one strength.")
    if intervention != "add_vector":
        unit = "raw"
    if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1:
        raise ValueError(f"batch_tokens is a number of tokens from 1 on, not {batch_tokens!r}.")
    chosen, wanted = _directions(model, vector, layers, unit)
    question = question_of(model, pairs, metric, normalize, chat)
    position = Position.of(at)
    make = _maker(intervention, chosen, at, unit)
    for layer in wanted:
        check_positions(make(layer, [1.0]), layer, at)
    prompts = len(question.texts) // (1 + question.pairs)
    made = Sweep(np.full((len(wanted), len(strong), prompts), np.nan), wanted, strong, unit, question.metric,
                 _record(model, chosen, question, at, intervention))  # fmt: skip
    if checkpoint is not None and Path(checkpoint).exists():
        _resume(made, checkpoint)
    moving = [i for i, s in enumerate(strong) if s]
    firsts = [first_edited(model, *one, position) for one in zip(question.texts, question.needed, strict=True)]
    grouped = list(groups(question, firsts, len(moving), batch_tokens, alone=not model._sites.family.batch))
    with reporting(progress, "sweeping") as step:
        for done, group in enumerate(grouped):
            if not np.isnan(made.effect[:, :, group]).any():
                step((done + 1) * len(wanted), len(grouped) * len(wanted))
                continue
            _sweep_group(
                model, made, question, group, position, make, moving, batch_tokens,
                functools.partial(_tick, step, done, len(wanted), len(grouped)),
            )  # fmt: skip
            if checkpoint is not None:
                made.to_json(checkpoint)
    return made


def _tick(step: Step, groups_done: int, layers: int, groups: int, layer: int) -> None:
    step(groups_done * layers + layer, groups * layers)


def _sweep_group(
    model: InterpretableModel,
    made: Sweep,
    question: Question,
    group: list[int],
    position: Position,
    make: Callable[[int, list[float]], Intervention],
    moving: list[int],
    batch_tokens: int,
    step: Callable[[int], None],
) -> None:
    """Fill in the effect on some prompts, at every layer and strength."""
    half = len(question.texts) // 2
    members = [*group, *(i + half for i in group)] if question.pairs else group
    starts = np.cumsum([0, *map(len, question.needed)])
    numbers = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in members])
    part = Question([question.texts[i] for i in members], [question.needed[i] for i in members], question.pairs,
                     question.metric, question.score)  # fmt: skip

    def score(logits: mx.array, positions: np.ndarray[Any, Any]) -> mx.array:
        return question.score(logits, numbers[positions])

    # A family whose rows differ in a batch runs a side at a time: no batch at all.
    alone = not model._sites.family.batch
    batches = [[i] for i in range(len(members))] if alone else [list(range(len(members)))]
    passes = []
    for rows in batches:
        texts, needed = [part.texts[i] for i in rows], [part.needed[i] for i in rows]
        passes.append(Continuation(model, texts, needed, position, pairs=part.pairs and not alone))
    clean = part.effect(np.concatenate([one.clean(score) for one in passes])[None])[0]
    width = max(one.width for one in passes)
    copies = 1 if alone else max(1, batch_tokens // (len(members) * width))
    for i, layer in enumerate(made.layers):
        site = model._sites.resolve(made.record["site"].format(layer=layer))
        for j, strength in enumerate(made.strengths):
            if not strength:
                made.effect[i, j, group] = clean
        for begin in range(0, len(moving), copies):
            some = moving[begin : begin + copies]
            found = []
            for one, rows in zip(passes, batches, strict=True):
                each = [made.strengths[j] for j in some for _ in rows]
                found.append(one.edited([(site, make(layer, each))], len(some), score))
            made.effect[np.ix_([i], some, group)] = part.effect(np.concatenate(found, axis=1))[None]
        step(i + 1)


def _record(
    model: InterpretableModel, vector: SteeringVector, question: Question, at: At, intervention: Maker
) -> dict[str, Any]:
    digest = hashlib.sha256(repr([(text.tokens, text.prompt) for text in question.texts]).encode())
    directions = hashlib.sha256(b"".join(np.array(vector[layer]).tobytes() for layer in vector))
    return {
        **model.identity,
        "site": vector.site,
        "vector": directions.hexdigest()[:16],
        "method": vector.info.get("method"),
        "intervention": intervention
        if isinstance(intervention, str)
        else getattr(intervention, "__name__", "callable"),
        "at": repr(at),
        "data": digest.hexdigest()[:16],
    }


def _resume(made: Sweep, checkpoint: str | Path) -> None:
    """Take over what a checkpoint has.

    Raises:
        ValueError: it is of another sweep.
    """
    before = Sweep.from_json(checkpoint)
    same = (before.layers, before.strengths, before.unit, before.metric, dict(before.record)) == (
        made.layers, made.strengths, made.unit, made.metric, dict(made.record))  # fmt: skip
    if not same or before.effect.shape != made.effect.shape:
        raise ValueError(f"{checkpoint} keeps another sweep: give another file, or remove it.")
    made.effect[...] = before.effect
