"""Steered texts over layers, strengths and prompts: what they have in common runs once, the rest in one batch.

The tokens of a prompt before the first edited one are the same whatever the layer and the strength, so they run once,
and every row of the batch goes on from a copy of their keys and values. Each row carries its own steering, and the
whole prompt that its positions are counted in.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import mlx.core as mx
import numpy as np
from rich.console import Group

from mlxsteer.decoding import Decoder, Job
from mlxsteer.display import Displayed, Shown, plain
from mlxsteer.generation import Generation
from mlxsteer.generation_options import processors_of, sampling_of
from mlxsteer.interventions.base import whole
from mlxsteer.interventions.files import as_json
from mlxsteer.model import InterpretableModel
from mlxsteer.positions import At
from mlxsteer.progress import Step, reporting
from mlxsteer.steering import Steering
from mlxsteer.sweep import _UNITS, Maker, _directions, _maker, check_positions, strengths_of
from mlxsteer.vectors import SteeringVector

Scorer: TypeAlias = "Callable[[str], float]"
"""From a generated text (a `Generation`, which is a `str`) to a number."""

_KNOBS = ("top_p", "top_k", "min_p")
_OPTIONS = (*_KNOBS, "logprobs", "logits_processors", "prefill_step_size")


@dataclass(frozen=True, eq=False)
class GenerationSweep(Displayed):
    """Texts generated under a steering vector, over layers, strengths, prompts and samples.

    Attributes:
        texts: layers × strengths × prompts × samples, each a `Generation` (a `str` with its tokens).
        layers: the layers of the first axis.
        strengths: the strengths of the second axis.
        prompts: the prompts of the third axis, as texts.
        unit: what a strength of 1 is: ``"raw"``, the vector; ``"residual"``, the layer's median norm.
        record: model, vector, data, positions, sampling and versions, to say what was generated how.
        scored: the scores by the scorer that was given, in the shape of `texts`; None without one.
    """

    texts: np.ndarray[Any, Any]
    layers: list[int]
    strengths: list[float]
    prompts: list[str]
    unit: str = "raw"
    record: Mapping[str, Any] = field(default_factory=dict)
    scored: np.ndarray[Any, Any] | None = None

    def __repr__(self) -> str:
        names = ("layer", "strength", "prompt", "sample")
        sizes = (f"{n} {name}{'s' * (n != 1)}" for n, name in zip(self.texts.shape, names, strict=True))
        return f"GenerationSweep({' × '.join(sizes)})"

    def scores(self, scorer: Scorer | None = None) -> np.ndarray[Any, Any]:
        """A number for every text, layers × strengths × prompts × samples.

        Args:
            scorer: from a text to a number; without one, the scores by the scorer that the sweep was given.

        Raises:
            TypeError: the scorer is no callable, or gives no number.
            ValueError: there is no scorer.
        """
        if scorer is None:
            if self.scored is None:
                raise ValueError("score by what? Give a scorer, a function from a text to a number.")
            return self.scored
        made, known = np.full(self.texts.shape, np.nan), {}
        for index in np.ndindex(*self.texts.shape):
            text: Any = self.texts[index]
            if id(text) not in known:  # the unsteered texts are shared by all layers
                known[id(text)] = _score(_checked(scorer), text)
            made[index] = known[id(text)]
        return made

    def table(self, width: int | None = None, *, characters: int = 240) -> str:
        """For each prompt a table in plain text, a row per layer, strength and sample.

        Args:
            width: columns; the terminal's unless given, 100 where there is none.
            characters: how much of each text is shown.
        """
        columns = width or shutil.get_terminal_size((100, 24)).columns
        return "\n".join(line.rstrip() for line in plain(self._tables(characters), columns).splitlines())

    def __rich__(self) -> Group:
        """The same for a terminal that shows colours."""
        return self._tables(240)

    def _repr_html_(self) -> str:
        return "".join(shown.html() for shown in self._shown_each(240))

    def _tables(self, characters: int) -> Group:
        return Group(*self._shown_each(characters))

    def _shown_each(self, characters: int) -> Iterator[Shown]:
        """For each prompt what is shown of its texts."""
        several, samples = len(self.layers) > 1, self.texts.shape[-1]
        heads = ["layer"] * several + ["strength"] + ["sample"] * (samples > 1) + ["score"] * (self.scored is not None)
        order = np.argsort(self.strengths, kind="stable")
        for k, prompt in enumerate(self.prompts):
            place = "" if several else f"layer {self.layers[0]}, "
            rows: list[list[str]] = []
            styles: dict[int, str] = {}
            for i, j, m in itertools.product(range(len(self.layers)), order, range(samples)):
                strength = self.strengths[j]
                cells = [str(self.layers[i])] * several + [f"{strength:+g}" if strength else "0"]
                cells += [str(m)] * (samples > 1)
                cells += [f"{self.scored[i, j, k, m]:.3g}"] if self.scored is not None else []
                styles |= {} if strength else {len(rows): "dim"}
                rows.append([*cells, _shown(self.texts[i, j, k, m], characters)])
            title = f"{_shown(prompt, characters)}\n{place}strength in {_UNITS[self.unit]}"
            yield Shown(title, (*heads, "text"), rows, texts=(len(heads),), styles=styles)

    def plot(self, path: str | Path | None = None) -> Any:
        """Score, length, variety and repeats of the texts over strengths, with intervals; a matplotlib figure.

        Args:
            path: also write it there, as PNG, PDF or SVG by suffix.
        """
        from mlxsteer.plots import plot_generation_sweep

        return plot_generation_sweep(self, path)

    def to_json(self, path: str | Path | None = None) -> str:
        """The sweep as JSON; with a path, also written there, whole or not at all."""
        texts = [[[list(map(_as_data, row)) for row in rows] for rows in layer] for layer in self.texts]
        scored = None if self.scored is None else self.scored.reshape(-1).tolist()
        data = {"unit": self.unit, "layers": self.layers, "strengths": self.strengths, "prompts": self.prompts,
                "prompt_tokens": [self.texts[0, 0, k, 0].prompt_tokens for k in range(len(self.prompts))],
                "texts": texts, "scored": scored, "record": self.record}  # fmt: skip
        return as_json(data, path)

    @classmethod
    def from_json(cls, path: str | Path) -> GenerationSweep:
        """Read what `to_json` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no sweep of texts.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            nested, prompts = data["texts"], data["prompts"]
            shape = (len(data["layers"]), len(data["strengths"]), len(prompts), len(nested[0][0][0]))
            texts = np.empty(shape, object)
            found = [one for rows in nested for row in rows for cell in row for one in cell]
            asked = itertools.cycle([tokens for tokens in data["prompt_tokens"] for _ in range(shape[-1])])
            for index, one, tokens in zip(np.ndindex(*shape), found, asked, strict=False):
                texts[index] = _from_data(one, tokens)
            if len(found) != texts.size or len(data["prompt_tokens"]) != len(prompts) or data["unit"] not in _UNITS:
                raise ValueError(f"{len(found)} texts for {shape}, or another unit than 'raw' and 'residual'")
            scored = None if data["scored"] is None else np.array(data["scored"], np.float64).reshape(shape)
            return cls(texts, data["layers"], data["strengths"], prompts, data["unit"], data["record"], scored)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no sweep of texts ({error}).") from error


def _shown(text: str, characters: int) -> str:
    """A text on one line, cut to what is shown of it."""
    line = str(text).replace("\n", "⏎")
    return line if len(line) <= characters else line[: max(characters - 1, 0)] + "…"


def _as_data(text: Generation) -> dict[str, Any]:
    data = {"text": str(text), "tokens": text.tokens, "finish_reason": text.finish_reason,
            "touched": "".join("01"[mark] for mark in text.touched)}  # fmt: skip
    return data if text.logprobs is None else {**data, "logprobs": text.logprobs.tolist()}


def _from_data(data: Mapping[str, Any], prompt: Sequence[int]) -> Generation:
    logprobs = mx.array(data["logprobs"], dtype=mx.float32) if "logprobs" in data else None
    touched = [mark == "1" for mark in data["touched"]]
    return Generation(data["text"], data["tokens"], prompt, data["finish_reason"], logprobs, touched)


def _checked(scorer: Any) -> Scorer:
    if not callable(scorer):
        raise TypeError(f"a scorer is a function from a text to a number, not {scorer!r}.")
    return scorer  # type: ignore[no-any-return]


def _score(scorer: Scorer, text: Generation) -> float:
    given: Any = scorer(text)
    try:
        return float(given)
    except (TypeError, ValueError):
        raise TypeError(f"a scorer gives one number for a text, not {given!r}.") from None


def generation_sweep(
    model: InterpretableModel,
    vector: SteeringVector | Mapping[int, Any],
    prompts: Iterable[Any],
    *,
    layers: str | int | Sequence[int],
    strengths: float | Sequence[float] = (-1.0, -0.5, 0.0, 0.5, 1.0),
    at: At = -1,
    unit: Literal["raw", "residual"] = "residual",
    intervention: Maker = "add_vector",
    max_tokens: int = 40,
    temp: float = 0.0,
    seed: int = 0,
    samples: int = 1,
    chat: bool = False,
    batch_size: int = 32,
    scorer: Scorer | None = None,
    progress: bool | Step | None = True,
    **options: Any,
) -> GenerationSweep:
    """Generate with each strength, at each layer, from each prompt, to read what a steering vector does.

    Everything decodes in one continuous batch, each row under a steering of its own. A prompt's tokens before the first
    edited one run once, clean, for all its rows; with several samples, its steered tokens run once for each steering.
    Strength 0 is decoded once for all layers. Families whose rows would differ in a batch decode row by row.

    Without sampling, a text is that of ``model.generate(prompt, vector.at(layer, strength, at, unit=unit))``, up to
    rounding: rows of a batch differ from a row alone by the last bits, which matters only where two tokens are as good
    as equally likely. With sampling, a row's draws depend on the seed, its prompt's place in the list and its sample's
    number alone: not on the other rows, the layers and strengths asked for, `batch_size` or `max_tokens`. All layers
    and strengths share the noise of their draws, so that texts differ by the steering; they aren't the draws of
    `model.generate` with this seed.

    Args:
        model: the model.
        vector: one direction per layer, or a dict from layers to directions.
        prompts: texts, lists of token ids, or chats (lists of messages).
        layers: a layer, several, or ``"all"`` that the vector has; each is steered alone. Negative ones count from
            the model's last.
        strengths: in the unit; 0 is plain generation.
        at: which tokens.
        unit: ``"residual"``: a strength of 1 adds the direction with the layer's median norm; ``"raw"``: it adds the
            vector as it is. For ``"add_vector"`` only.
        intervention: what is done with the direction, by name; or a callable from a direction and a list of one
            strength to an intervention, which is to act at `at`.
        max_tokens: the most tokens to generate; fewer where a model's learned positions end before.
        temp: the temperature; 0 is greedy.
        seed: for sampling.
        samples: texts per layer, strength and prompt.
        chat: prompts are a user's messages.
        batch_size: the most rows that decode at once; memory is bounded by it.
        scorer: from a text to a number, called on each text as it ends, outside of the steering.
        progress: True for a bar on a terminal, or a function that is called with the number of texts done and in all.
        options: ``top_p``, ``top_k``, ``min_p`` for sampling; ``logprobs=True`` to keep each token's log-probability;
            ``logits_processors`` and ``prefill_step_size`` as in mlx-lm.

    Returns:
        A `GenerationSweep`.

    Raises:
        TypeError: no prompts, vector, scorer or option.
        ValueError: there are no prompts, layers or strengths; a number lies outside its range; the vector doesn't fit;
            several samples without sampling; a prompt leaves no learned position to generate at.
        KeyError: the vector lacks a layer.
        PositionError: a position means nothing in a prompt.
        NeverFired: a place's module doesn't run in this model's forward.
    """
    asked = _options({**options, "max_tokens": max_tokens, "temp": temp, "seed": seed}, samples, batch_size)
    strong = strengths_of(strengths)
    if not strong:
        raise ValueError("a sweep needs at least one strength.")
    if scorer is not None:
        _checked(scorer)
    chosen, wanted = _directions(model, vector, layers, unit if intervention == "add_vector" else "raw")
    if not wanted:
        raise ValueError(f"a sweep needs at least one layer; the vector has {chosen.layers}.")
    given = _prompts(prompts)
    tokens = [model._encode_row(_as_chat(one) if chat else one, row) for row, one in enumerate(given)]
    if intervention != "add_vector":
        unit = "raw"
    steerings = _steerings(model, chosen, wanted, strong, at, unit, intervention)
    decoder = Decoder(model, tokens, list(steerings.values()), samples, asked)
    shape = (len(wanted), len(strong), len(given), samples)
    jobs = [Job(cells, k, m, steering) for k, (cells, steering), m in
            itertools.product(range(len(given)), _cells(wanted, strong, steerings), range(samples))]  # fmt: skip
    texts, scored = np.empty(shape, object), np.full(shape, np.nan) if scorer is not None else None
    with reporting(progress, "generating") as step, closing(decoder.decoded(jobs, batch_size)) as decoded:
        for done, (job, text) in enumerate(decoded):
            score = _score(scorer, text) if scorer is not None else np.nan
            for i, j in job.cells:
                texts[i, j, job.prompt, job.sample] = text
                if scored is not None:
                    scored[i, j, job.prompt, job.sample] = score
            step(done + 1, len(jobs))
    shown = [one if isinstance(one, str) else model.decode(ids) for one, ids in zip(given, tokens, strict=True)]
    record = _record(model, chosen, tokens, at, intervention, {**options, "max_tokens": max_tokens, "temp": temp,
                     "seed": seed, "chat": chat})  # fmt: skip
    return GenerationSweep(texts, wanted, strong, shown, unit, record, scored)


def _options(given: dict[str, Any], samples: int, batch_size: int) -> dict[str, Any]:
    """What is asked of the decoder, checked.

    Raises:
        TypeError: there is no such option, or a number is none.
        ValueError: a number lies outside its range; sampling is asked for without a temperature.
    """
    for name in set(given) - {"max_tokens", "temp", "seed", *_OPTIONS}:
        near = difflib.get_close_matches("temp" if name == "temperature" else name, [*_OPTIONS, "temp", "max_tokens"])
        why = " Each row draws for itself: give temp, top_p, top_k or min_p." if name == "sampler" else ""
        raise TypeError(
            f"no option {name!r}; there are {', '.join(_OPTIONS)}.{why}" + (f" Nearest: {near[0]}." if near else "")
        )
    counts = {"max_tokens": given["max_tokens"], "samples": samples, "batch_size": batch_size}
    counts["prefill_step_size"] = given.get("prefill_step_size", 2048)
    for name, value in counts.items():
        counts[name] = whole(value, name, 1)
    temp, knobs = sampling_of({name: given.get(name) for name in ("temp", *_KNOBS)})
    if not temp and samples > 1:
        raise ValueError(f"samples={samples} with temp=0 is {samples} times the same text: give temp=, such as 1.")
    return {
        "max_tokens": counts["max_tokens"],
        "temp": temp,
        "seed": whole(given["seed"], "seed", 0),
        "knobs": knobs,
        "logprobs": bool(given.get("logprobs")),
        "logits_processors": processors_of(given.get("logits_processors") or []),
        "prefill_step_size": counts["prefill_step_size"],
    }


def _prompts(given: Any) -> list[Any]:
    """The prompts, several.

    Raises:
        TypeError: it is one prompt: a text, token ids, a chat.
        ValueError: there are none.
    """
    if isinstance(given, (str, bytes, Mapping)):
        raise TypeError("a sweep takes a list of prompts; one prompt is [prompt].")
    rows = list(given)
    if not rows:
        raise ValueError("a sweep needs at least one prompt.")
    if isinstance(rows[0], Mapping):
        raise TypeError("these are a chat's messages, which are one prompt: a list of one chat is [messages].")
    if isinstance(rows[0], (int, np.integer)):
        raise TypeError("these are one prompt's token ids: a list of one prompt is [ids].")
    return rows


def _as_chat(prompt: Any) -> Any:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _steerings(
    model: InterpretableModel,
    vector: SteeringVector,
    layers: Sequence[int],
    strengths: Sequence[float],
    at: At,
    unit: str,
    intervention: Maker,
) -> dict[tuple[int, float], Steering]:
    """(layer, strength) → the steering; none for strength 0.

    Raises:
        ValueError: it doesn't fit the model, or acts elsewhere than it was asked to.
    """
    make = _maker(intervention, vector, at, unit)
    made: dict[tuple[int, float], Steering] = {}
    for layer, strength in itertools.product(layers, strengths):
        if not strength or (layer, strength) in made:
            continue
        edit = make(layer, [strength])
        check_positions(edit, layer, at)
        steering = Steering.of(model._sites, {vector.key(layer): edit}).row(0)
        made[layer, strength] = steering
    return made


def _cells(
    layers: Sequence[int], strengths: Sequence[float], steerings: Mapping[tuple[int, float], Steering]
) -> list[tuple[list[tuple[int, int]], Steering | None]]:
    """Every different steering, with the layers and strengths, by index, that it stands for."""
    found: dict[Any, list[tuple[int, int]]] = {}
    for i, j in np.ndindex(len(layers), len(strengths)):
        key = (layers[i], strengths[j]) if strengths[j] else None
        found.setdefault(key, []).append((i, j))
    return [(cells, steerings[key] if key is not None else None) for key, cells in found.items()]


def _record(
    model: InterpretableModel,
    vector: SteeringVector,
    prompts: Sequence[Sequence[int]],
    at: At,
    intervention: Maker,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    directions = hashlib.sha256(b"".join(np.array(vector[layer]).tobytes() for layer in vector))
    name = intervention if isinstance(intervention, str) else getattr(intervention, "__name__", "callable")
    plain = {k: v if isinstance(v, (bool, int, float, str)) or v is None else repr(v) for k, v in options.items()}
    return {
        **model.identity,
        "site": vector.site,
        "vector": directions.hexdigest()[:16],
        "method": vector.info.get("method"),
        "intervention": name,
        "at": repr(at),
        "data": hashlib.sha256(repr([list(ids) for ids in prompts]).encode()).hexdigest()[:16],
        **plain,
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "mlxsteer")},
    }
