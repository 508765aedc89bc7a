"""Layer × strength grids: one clean pass, and from each layer on only what the edit changes."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxsteer.continuation import check_touched, first_edited, passes_over, shares
from mlxsteer.display import Displayed, Shown, heat
from mlxsteer.hooks import residents, surrounding
from mlxsteer.interventions import create
from mlxsteer.interventions.base import Intervention, number
from mlxsteer.interventions.files import as_json
from mlxsteer.interventions.gates import looks_back
from mlxsteer.interventions.registry import registered
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import PAIR_HASHES, checked, counted, pairs_seen
from mlxsteer.positions import At, Position, after
from mlxsteer.progress import Step, reporting
from mlxsteer.questions import Metric, Question, groups, question_of
from mlxsteer.steering import Steering
from mlxsteer.vectors import SteeringVector

Maker: TypeAlias = "str | Callable[[mx.array, list[float]], Intervention]"
"""The name of a registered intervention that takes one direction, or a callable from a direction and one strength per
row to an intervention."""


@dataclass(frozen=True, eq=False)
class Sweep(Displayed):
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
    def finished(self) -> np.ndarray[Any, Any]:
        """Which prompts were measured at every layer and strength, (prompts,); all, unless it was interrupted."""
        finished: np.ndarray[Any, Any] = ~np.isnan(self.effect).any(axis=(0, 1))
        return finished

    @property
    def mean(self) -> np.ndarray[Any, Any]:
        """The mean effect over the finished prompts, layers × strengths.

        Raises:
            ValueError: no prompt is finished.
        """
        if not self.finished.any():
            raise ValueError("no prompt of this sweep is finished: run it to its end, with checkpoint= to go on.")
        mean: np.ndarray[Any, Any] = self.effect[:, :, self.finished].mean(axis=2)
        return mean

    def table(self) -> str:
        """The mean effect over prompts as a table in plain text; layers down, strengths across.

        Raises:
            ValueError: no prompt is finished.
        """
        _ = self.mean  # an empty grid is no table
        return self._shown().plain(foot=True)

    @property
    def warnings(self) -> list[str]:
        """What is to be kept in mind of the numbers, in words."""
        seen = self.record.get("pairs_seen")
        if not isinstance(seen, int) or not seen:
            return []
        return [
            f"the vector was computed from {seen} of the {counted(self.effect.shape[2], 'pair')}: what it does on them "
            "looks better than it is."
        ]

    def _shown(self) -> Shown:
        done = int(self.finished.sum())
        mean = self.mean if done else np.full(self.effect.shape[:2], np.nan)
        base = mean[:, [self.strengths.index(0.0)]] if 0.0 in self.strengths else mean.mean()
        form = ".3g" if self.metric.startswith("P(") else "+.2f"
        return Shown(
            f"{_TITLES.get(self.metric, self.metric)}, mean over prompts; {self._strengths_in()}",
            ("layer", *(f"{strength:+g}" if strength else "0" for strength in self.strengths)),
            [
                (str(layer), *("" if np.isnan(value) else f"{value:{form}}" for value in row))
                for layer, row in zip(self.layers, mean, strict=True)
            ],
            heat=heat(mean, base),
            foot="\n".join(
                [
                    *(
                        []
                        if self.finished.all()
                        else [f"interrupted: {done} of {len(self.finished)} prompts are finished"]
                    ),
                    *(f"Warning: {warning}" for warning in self.warnings),
                ]
            ),
        )

    def _strengths_in(self) -> str:
        added = self.record.get("intervention", "add_vector") == "add_vector"
        return f"strength in {_UNITS[self.unit]}" if added else f"strength of {self.record['intervention']}"

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
        data = {"metric": self.metric, "unit": self.unit, "layers": self.layers, "strengths": self.strengths,
                "effect": self.effect.tolist(), "record": self.record}  # fmt: skip
        return as_json(data, path)

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
            layers = [int(layer) for layer in data["layers"]]
            strengths = [number(strength, "a strength") for strength in data["strengths"]]
            made = cls(effect, layers, strengths, data["unit"], str(data["metric"]), dict(data["record"]))
            if effect.shape[:2] != (len(layers), len(strengths)) or effect.ndim != 3 or made.unit not in _UNITS:
                raise ValueError(f"an effect of shape {effect.shape} in units of {made.unit!r}")
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} holds no sweep ({error}).") from error
        return made

    def plot(self, path: str | Path | None = None) -> Any:
        """A heat map of the mean effect, and the dose–response of each layer with intervals; a matplotlib figure.

        Args:
            path: also write it there, as PNG, PDF or SVG by suffix.
        """
        from mlxsteer.plots import plot_sweep

        return plot_sweep(self, path)


_TITLES = {"logprob_difference": "log P(positive) − log P(negative) in nats"}
_UNITS = {"raw": "vectors", "residual": "residual norms"}


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
    wanted = chosen_layers(model, vector, layers)
    if unit == "residual" and not vector.residual_norms:
        raise ValueError("unit='residual' needs the layers' norms, and these directions come without: unit='raw'.")
    for layer in wanted:
        vector.at(layer, unit=unit)  # type: ignore[arg-type]  # refuse what is missing before anything runs
    return vector, wanted


def strengths_of(given: Any) -> list[float]:
    """A strength, or several, as numbers.

    Raises:
        TypeError, ValueError: one is no finite number.
    """
    if isinstance(given, (np.ndarray, mx.array)):
        given = given.reshape(-1).tolist()
    several = isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping))
    return [number(strength, "a strength") for strength in (given if several else [given])]


def chosen_layers(model: InterpretableModel, vector: SteeringVector, layers: Any) -> list[int]:
    """``"all"``, a layer, or several, as numbers of layers that the vector has, in the order given.

    Args:
        model: the model, from whose last layer negative numbers count.
        vector: the vector.
        layers: what was asked for.

    Raises:
        ValueError: they are none, none at all, or named twice.
        KeyError: the vector lacks one.
    """
    if isinstance(layers, str) and layers == "all":
        return list(vector)
    if isinstance(layers, (np.ndarray, mx.array)):
        layers = layers.tolist()
    several = isinstance(layers, Iterable) and not isinstance(layers, (str, bytes, Mapping))
    given: list[Any] = list(layers) if several else [layers]
    count = len(model.layers)
    whole = [one for one in given if isinstance(one, (int, np.integer)) and not isinstance(one, bool)]
    chosen = [int(one) + (count if one < 0 else 0) for one in whole]
    if len(whole) < len(given) or not given or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"layers are 'all', a layer, or a list of different layers of {vector.layers}, not {layers!r}."
        )
    if (least := min(whole)) < -count:
        raise ValueError(f"there is no layer {least}: the model has {count}, from 0 to {count - 1}.")
    for layer in chosen:
        vector[layer]  # refuses one that it lacks
    return chosen


def _maker(
    intervention: Maker, vector: SteeringVector, at: At, unit: str
) -> Callable[[int, list[float]], Intervention]:
    """(layer, a strength per row) → the intervention there."""

    def make(layer: int, rows: list[float]) -> Intervention:
        if intervention == "add_vector":
            return vector.at(layer, rows, at, unit=unit)[vector.key(layer)]  # type: ignore[arg-type]
        if callable(intervention):
            return intervention(vector[layer], rows)
        return create(intervention, **{parameters[0]: vector[layer]}, strength=rows, at=at)

    parameters: list[str] = []
    if isinstance(intervention, str):
        found = {name: _directional(cls) for name, cls in registered().items()}
        if intervention in found and not found[intervention]:
            fitting = ", ".join(sorted(name for name, own in found.items() if own))
            raise ValueError(
                f"intervention={intervention!r} isn't made of one direction; {fitting} are, and so is what a callable "
                "(direction, strengths) → intervention makes."
            )
        parameters = found.get(intervention) or ["direction"]
    return make


def _directional(kind: type[Intervention]) -> list[str]:
    """The parameter of a registered intervention that takes its direction, if that is all it needs."""
    signature = inspect.signature(kind).parameters.values()
    needed = [p.name for p in signature if p.default is p.empty]
    return needed if len(needed) == 1 and needed[0] in ("vector", "direction", "directions") else []


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
        layers: which layers, negative ones counted from the model's last; or ``"all"`` that the vector has.
        strengths: in the unit.
        at: which tokens; a pair's prompt is the prompt, its completion counts as generated.
        unit: ``"residual"``: a strength of 1 adds the direction with the layer's median norm, so that strengths mean
            the same at every layer; ``"raw"``: it adds the vector as it is. For ``"add_vector"`` only.
        intervention: what is done with the direction, such as ``"add_vector"`` or ``"ablate"``; or a callable from a
            direction and one strength per row to an intervention that acts at `at`.
        metric: ``"logprob_difference"``: log P(positive) − log P(negative) of a pair's completions, in nats, summed
            over tokens. For prompts a list of texts of one token each, such as ``[" yes", " Yes"]``, for their
            probability together; or a callable from logits (rows, vocabulary), float32, to one number per row, (rows,),
            where a row is one prompt at one strength.
        normalize: ``"token"`` divides a completion's log-probability by its number of tokens.
        chat: prompts are a user's messages.
        batch_tokens: the most tokens in one batch, padding and strengths included; memory is bounded by it.
        checkpoint: a JSON file that keeps what is done, and from which the same sweep goes on. Callables are told
            apart by their code; one that captures values of its surroundings can't be, and is refused.
        progress: True for a bar on a terminal, or a function that is called with the number of steps done and in all.

    Returns:
        A `Sweep`.

    Raises:
        TypeError: no pairs, prompts, vector or metric.
        ValueError: there are no pairs or no strengths; the vector doesn't fit; the checkpoint is of another sweep.
        KeyError: the vector lacks a layer.
    """
    strong = strengths_of(strengths)
    if not strong or len(set(strong)) < len(strong):
        raise ValueError(f"a sweep needs at least one strength, and each of them once, not {strengths!r}.")
    if intervention != "add_vector":
        unit = "raw"
    if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1:
        raise ValueError(f"batch_tokens is a number of tokens from 1 on, not {batch_tokens!r}.")
    chosen, wanted = _directions(model, vector, layers, unit)
    pairs = list(pairs) if isinstance(pairs, Iterator) else pairs  # looked at twice
    question = question_of(model, pairs, metric, normalize, chat)
    seen = pairs_seen(chosen.info.get(PAIR_HASHES), checked(pairs)) if question.pairs else None
    position = Position.of(at)
    make = _maker(intervention, chosen, at, unit)
    tried = {layer: make(layer, [1.0]) for layer in wanted}
    for layer, one in tried.items():
        check_positions(one, layer, at)
    prompts = len(question.texts) // (1 + question.pairs)
    if checkpoint is not None:
        _check_checkpoint(model, checkpoint)
    for what in (intervention, metric, at):
        if checkpoint is not None and callable(what) and _code(what) is None:
            raise ValueError(
                f"{what!r} captures values, so that a checkpoint couldn't tell it from another: write it as a function "
                "of its arguments alone, or leave checkpoint= out."
            )
    made = Sweep(np.full((len(wanted), len(strong), prompts), np.nan), wanted, strong, unit, question.metric,
                 _record(model, chosen, question, at, intervention, metric) | {"pairs_seen": seen})  # fmt: skip
    if checkpoint is not None and Path(checkpoint).exists():
        _resume(made, checkpoint)
    moving = [i for i, s in enumerate(strong) if s]
    texts = list(zip(question.texts, question.needed, strict=True))
    check_touched(model, texts, [position], at)
    if any(map(looks_back, tried.values())):  # spans and means see what isn't edited, too
        position = Position.of("all")
    firsts = [first_edited(model, *one, position) if shares(model) else 0 for one in texts]
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
    part = Question([question.texts[i] for i in members], [question.needed[i] for i in members], question.pairs,
                    question.metric, question.score)  # fmt: skip
    passes = passes_over(model, question, members, position)
    clean = part.effect(np.concatenate([one.clean(score) for one, _, score in passes])[None])[0]
    width = max(one.width for one, _, _ in passes)
    # A family whose rows differ in a batch takes a strength at a time, too.
    copies = max(1, batch_tokens // (len(members) * width)) if model._sites.family.batch else 1
    for i, layer in enumerate(made.layers):
        site = model._sites.resolve(made.record["site"].replace("{layer}", str(layer)))
        for j, strength in enumerate(made.strengths):
            if not strength:
                made.effect[i, j, group] = clean
        for begin in range(0, len(moving), copies):
            some = moving[begin : begin + copies]
            found = []
            for one, rows, score in passes:
                each = [made.strengths[j] for j in some for _ in rows]
                edits = Steering.of(model._sites, {site.key: make(layer, each)}).edits
                found.append(one.edited(edits, len(some), score))
            made.effect[np.ix_([i], some, group)] = part.effect(np.concatenate(found, axis=1))[None]
        step(i + 1)


def _record(
    model: InterpretableModel, vector: SteeringVector, question: Question, at: At, intervention: Maker, metric: Metric
) -> dict[str, Any]:
    digest = hashlib.sha256(repr([(text.tokens, text.prompt) for text in question.texts]).encode())
    code = {name: _code(what) for name, what in (("intervention", intervention), ("metric", metric)) if callable(what)}
    return {
        **model.identity,
        "site": vector.site,
        "weights": _weights(model),
        "vector": vector.fingerprint,
        "residual_norms": {str(layer): norm for layer, norm in vector.residual_norms.items()},
        "method": vector.info.get("method"),
        "intervention": intervention
        if isinstance(intervention, str)
        else getattr(intervention, "__name__", "callable"),
        "at": _code(at) if callable(at) and not isinstance(at, after) else repr(at),
        "data": digest.hexdigest()[:16],
        **({"code": code} if code else {}),
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "mlxsteer")},
    }


def _code(function: Any) -> str | None:
    """A hash of what a function does, if that is in its code alone."""
    code = getattr(function, "__code__", None)
    if code is None or function.__closure__ or function.__defaults__:
        return None
    return hashlib.sha256(repr((code.co_code, code.co_consts, code.co_names)).encode()).hexdigest()[:16]


def _check_checkpoint(model: InterpretableModel, checkpoint: str | Path) -> None:
    """Refuse a checkpoint that can't be written, or couldn't say what it is of, before anything runs.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such folder, or it is one.
        ValueError: the model is steered, which no checkpoint records.
    """
    path = Path(checkpoint)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it.")
    if surrounding(model.model) or residents(model.model):
        raise ValueError("this model is steered already, which a checkpoint doesn't record: leave checkpoint= out.")


def _weights(model: InterpretableModel) -> str:
    """A hash of a few numbers of every parameter, to tell models of one name apart."""
    some = [array.reshape(-1)[:8].astype(mx.float32) for _, array in tree_flatten(model.model.parameters())]
    return hashlib.sha256(np.array(mx.concatenate(some)).tobytes()).hexdigest()[:16]


def _resume(made: Sweep, checkpoint: str | Path) -> None:
    """Take over what a checkpoint has.

    Raises:
        ValueError: it is of another sweep.
    """
    before = Sweep.from_json(checkpoint)
    mine, theirs = ({k: v for k, v in sweep.record.items() if k != "versions"} for sweep in (made, before))
    same = (before.layers, before.strengths, before.unit, before.metric, theirs) == (
        made.layers, made.strengths, made.unit, made.metric, mine)  # fmt: skip
    if not same or before.effect.shape != made.effect.shape:
        raise ValueError(f"{checkpoint} keeps another sweep: give another file, or remove it.")
    made.effect[...] = before.effect
