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
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator, stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from mlxsteer.forks import forkable, forked
from mlxsteer.generation import Generation, _text, _touched
from mlxsteer.hooks import active, attached
from mlxsteer.interventions.base import number
from mlxsteer.interventions.files import write_whole
from mlxsteer.model import InterpretableModel
from mlxsteer.plans import Plan
from mlxsteer.positions import At, Position, PositionError, Prompt
from mlxsteer.progress import Step, reporting
from mlxsteer.reading import SHORTEST_SHARED
from mlxsteer.steering import Row, Steering, SteeringState, carrier, ride
from mlxsteer.sweep import _UNITS, Maker, _directions, _maker, check_positions
from mlxsteer.vectors import SteeringVector

Scorer: TypeAlias = "Callable[[str], float]"
"""From a generated text (a `Generation`, which is a `str`) to a number."""

PREFILL_TOKENS = 16384
"""Prompts are prefilled together up to about so many tokens at a time, as mlx-lm does by default (8 × 2048)."""

_KNOBS = ("top_p", "top_k", "min_p")
_OPTIONS = (*_KNOBS, "logprobs", "logits_processors", "prefill_step_size")


@dataclass(frozen=True, eq=False)
class GenerationSweep:
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
            text = self.texts[index]
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
        console = Console(
            width=width or shutil.get_terminal_size((100, 24)).columns, no_color=True, force_terminal=False
        )
        with console.capture() as capture:
            console.print(self._tables(characters))
        return "\n".join(line.rstrip() for line in capture.get().splitlines()).rstrip()

    def __rich__(self) -> Group:
        """The same for a terminal that shows colours."""
        return self._tables(240)

    def _tables(self, characters: int) -> Group:
        several = len(self.layers) > 1
        samples = self.texts.shape[-1]
        made = []
        for k, prompt in enumerate(self.prompts):
            place = "" if several else f"layer {self.layers[0]}, "
            title = Text(f"{_shown(prompt, characters)}\n{place}strength in {_UNITS[self.unit]}")
            table = Table(title=title, title_justify="left", expand=True)
            if several:
                table.add_column("layer", justify="right")
            table.add_column("strength", justify="right")
            if samples > 1:
                table.add_column("sample", justify="right")
            if self.scored is not None:
                table.add_column("score", justify="right")
            table.add_column("text", ratio=1, overflow="fold")
            order = np.argsort(self.strengths, kind="stable")
            for i, j, m in itertools.product(range(len(self.layers)), order, range(samples)):
                strength = self.strengths[j]
                cells = [str(self.layers[i])] * several + [f"{strength:+g}" if strength else "0"]
                cells += [str(m)] * (samples > 1)
                cells += [f"{self.scored[i, j, k, m]:.3g}"] if self.scored is not None else []
                text = Text(_shown(self.texts[i, j, k, m], characters), style="" if strength else "dim")
                table.add_row(*cells, text)
            made.append(table)
        return Group(*made)

    def to_json(self, path: str | Path | None = None) -> str:
        """The sweep as JSON; with a path, also written there, whole or not at all."""
        texts = [[[list(map(_as_data, row)) for row in rows] for rows in layer] for layer in self.texts]
        scored = None if self.scored is None else [None if np.isnan(s) else float(s) for s in self.scored.reshape(-1)]
        data = {"unit": self.unit, "layers": self.layers, "strengths": self.strengths, "prompts": self.prompts,
                "prompt_tokens": [self.texts[0, 0, k, 0].prompt_tokens for k in range(len(self.prompts))],
                "texts": texts, "scored": scored, "record": dict(self.record)}  # fmt: skip
        text = json.dumps(data, indent=1)
        if path is not None:
            write_whole(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
        return text

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


# -- rows ----------------------------------------------------------------------------------------------------------


class _Draws:
    """A row's own sampler: its draws depend on nothing but a seed and the logits of this row.

    Drawn by the Gumbel trick with a key per step, so that rows with one seed share their noise: two strengths differ by
    the steering, not by luck.

    Args:
        seed: numbers that name the row.
        temp: the temperature, above 0.
        knobs: ``top_p``, ``min_p``, ``top_k``, as mlx-lm's sampler has them, in its order.
    """

    def __init__(self, seed: Sequence[int], temp: float, knobs: Mapping[str, Any]) -> None:
        self._keys = np.random.default_rng(list(seed))
        self._temp, self._knobs = temp, knobs

    def __call__(self, logprobs: mx.array) -> mx.array:
        knobs = self._knobs
        if 0 < knobs.get("top_p", 1.0) < 1:
            logprobs = apply_top_p(logprobs, knobs["top_p"])
        if knobs.get("min_p", 0.0) > 0:
            logprobs = apply_min_p(logprobs, knobs["min_p"])
        if 0 < knobs.get("top_k", 0) < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, knobs["top_k"])
        key = mx.array(self._keys.integers(0, 2**32, 2, dtype=np.uint32))
        return mx.random.categorical(logprobs.astype(mx.float32) / self._temp, key=key)


@dataclass(eq=False)
class _Job:
    """One row to decode, and what it has made so far.

    Attributes:
        cells: the layers and strengths, by index, whose text it is.
        prompt: the number of its prompt.
        sample: the number of its sample.
        steering: what steers it; None where the strength is 0.
    """

    cells: list[tuple[int, int]]
    prompt: int
    sample: int
    steering: Steering | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[mx.array] = field(default_factory=list)
    reason: str | None = None

    def take(self, response: Any, logprobs: bool) -> None:
        """One more token, as mlx-lm's generators give it; the one that ends a text isn't part of it."""
        self.reason = response.finish_reason
        if self.reason != "stop":
            self.tokens.append(response.token)
            if logprobs:
                chosen = response.logprobs[response.token]
                mx.eval(chosen)  # else it would keep the log-probabilities of the whole vocabulary alive
                self.logprobs.append(chosen)


class _Decoder:
    """Decodes rows over some prompts, each prompt's unedited beginning once.

    Args:
        model: the model.
        prompts: their token ids.
        steerings: everything that rows may carry.
        samples: rows that differ by their draws alone.
        options: what is asked of mlx-lm's generators: max_tokens, temp, seed, and the options of `generation_sweep`.

    Raises:
        PositionError: a position means nothing in a prompt.
    """

    def __init__(
        self,
        model: InterpretableModel,
        prompts: Sequence[list[int]],
        steerings: Sequence[Steering],
        samples: int,
        options: Mapping[str, Any],
    ) -> None:
        self.model, self.sites, self.options, self.samples = model.model, model._sites, options, samples
        self.tokenizer = model._needed_tokenizer("generation")
        self.around = tuple(s for plan in active(self.model) if plan.adopt for s in plan.steerings)
        self.prompts = [Prompt(len(tokens), tokens, self.tokenizer.decode) for tokens in prompts]
        cache = make_prompt_cache(self.model)
        # Whoever keeps one object twice in a cache wants both to move together, which copies don't.
        self.forks = forkable(cache) and len({id(entry) for entry in cache}) == len(cache)
        self.batches = self.sites.family.batch and all(hasattr(entry, "merge") for entry in cache)
        positions = {at for steering in steerings for at in steering.positions()}
        self.clean = [self._clean(number, prompt, positions) for number, prompt in enumerate(self.prompts)]
        # What rows that come one after the other go on from: the newest prompt's beginning, and a steering's on it.
        self._begun: dict[str, tuple[Any, list[Any]]] = {}

    def _clean(self, number: int, prompt: Prompt, positions: Iterable[Position]) -> int:
        """How many tokens of a prompt run once for all: those before the first edited one, the last one excepted."""
        assert prompt.length is not None
        last = prompt.length - 1
        try:
            first = min([last, *(span.start for at in positions for span in prompt.ranges(at) if span)])
        except PositionError as error:
            raise PositionError(f"prompt {number}: {error}") from error
        return first if self.forks and (first == last or first >= SHORTEST_SHARED) else 0

    def decoded(self, jobs: Iterable[_Job], batch_size: int) -> Generator[tuple[_Job, Generation], None, None]:
        """Rows and their texts, as they end. The model is plain, or as it is around this, whenever one is given."""
        with closing(self._batched(jobs, batch_size) if self.batches else self._single(jobs)) as ended:
            yield from map(self._ended, ended)

    def _ended(self, job: _Job) -> tuple[_Job, Generation]:
        """A row that has ended, and its text."""
        prompt = self.prompts[job.prompt].ids("a prompt")
        steerings = [*self.around, *([job.steering] if job.steering else [])]
        logprobs = None
        if self.options["logprobs"]:
            logprobs = mx.stack(job.logprobs) if job.logprobs else mx.zeros((0,))
        touched = _touched(steerings, prompt, len(job.tokens), self.tokenizer)
        text = _text(self.tokenizer, job.tokens)
        return job, Generation(text, job.tokens, prompt, job.reason, logprobs, touched)

    def _sampler(self, job: _Job) -> _Draws | None:
        options = self.options
        if not options["temp"]:
            return None
        return _Draws((options["seed"], job.prompt, job.sample), options["temp"], options["knobs"])

    def _batched(self, jobs: Iterable[_Job], batch_size: int) -> Generator[_Job, None, None]:
        """In one continuous batch; a row joins when there is room, so that no more than that many caches exist."""
        options, waiting = self.options, iter(jobs)
        longest = max(len(p.ids("a prompt")) - clean for p, clean in zip(self.prompts, self.clean, strict=True))
        together = max(1, min(batch_size, PREFILL_TOKENS // min(longest, options["prefill_step_size"])))
        generator = BatchGenerator(
            self.model,
            stop_tokens=[[t] for t in self.tokenizer.eos_token_ids],
            completion_batch_size=batch_size,
            prefill_batch_size=together,
            prefill_step_size=options["prefill_step_size"],
            logits_processors=options["logits_processors"],
        )
        running: dict[int, _Job] = {}
        carried: dict[int, Steering] = {}
        plan = Plan(self.sites)
        with closing(generator):
            while True:
                for job in itertools.islice(waiting, batch_size - len(running)):
                    cache, seen, rest = self._begin(job)
                    (uid,) = generator.insert(
                        [rest], [options["max_tokens"]], [cache], [seen], samplers=[self._sampler(job)]
                    )
                    running[uid] = job
                now = {id(job.steering): job.steering for job in running.values() if job.steering is not None}
                if now.keys() != carried.keys():
                    if plan.forwards:
                        plan.check_fired()
                    # Only what rows carry now: every edit of a plan is asked in every forward.
                    carried, plan = now, Plan(self.sites, steerings=list(now.values()))
                with attached(plan):
                    responses = generator.next_generated()
                if not responses:
                    return
                for response in responses:
                    running[response.uid].take(response, options["logprobs"])
                for response in responses:
                    if response.finish_reason is not None:
                        yield running.pop(response.uid)

    def _single(self, jobs: Iterable[_Job]) -> Generator[_Job, None, None]:
        """Row by row, where rows of a batch would decode otherwise than alone."""
        options = self.options
        for job in jobs:
            cache, _, rest = self._begin(job)
            plan = Plan(self.sites, steerings=[job.steering] if job.steering else [])
            pieces = stream_generate(
                self.model, self.tokenizer, rest, prompt_cache=cache, max_tokens=options["max_tokens"],
                sampler=self._sampler(job), logits_processors=options["logits_processors"],
                prefill_step_size=options["prefill_step_size"],
            )  # fmt: skip
            with closing(pieces), attached(plan):
                for piece in pieces:
                    job.take(piece, options["logprobs"])
            plan.check_fired()
            yield job

    def _begin(self, job: _Job) -> tuple[list[Any], list[int], list[int]]:
        """A row's cache, the tokens that it holds already, and those that it is still to be filled with."""
        tokens, seen = self.prompts[job.prompt].ids("a prompt"), self.clean[job.prompt]
        if not self.forks:
            return self._carrying(make_prompt_cache(self.model), job.prompt, 0, job.steering), [], list(tokens)
        cache = self._shared("clean", job.prompt, None, (0, seen), job.prompt, None)
        if self.samples > 1 and seen < len(tokens) - 1:
            # Samples differ from their first generated token on: their steered prompt runs once too.
            name, end = (job.prompt, id(job.steering)), len(tokens) - 1
            cache, seen = self._shared("steered", name, cache, (seen, end), job.prompt, job.steering), end
        return self._carrying(forked(cache, 1, 1), job.prompt, seen, job.steering), tokens[:seen], tokens[seen:]

    def _shared(
        self,
        kind: str,
        name: Any,
        cache: list[Any] | None,
        span: tuple[int, int],
        prompt: int,
        steering: Steering | None,
    ) -> list[Any]:
        """A cache that goes on from another one by a span of a prompt's tokens; the newest of its kind is kept."""
        if self._begun.get(kind, (None,))[0] == name:
            return self._begun[kind][1]
        filled = forked(cache, 1, 1) if cache is not None else make_prompt_cache(self.model)
        self._carrying(filled, prompt, span[0], steering)
        plan, step = Plan(self.sites, steerings=[steering] if steering else []), self.options["prefill_step_size"]
        with attached(plan):
            for begin in range(*span, step):
                ids = self.prompts[prompt].ids("a prompt")[begin : min(begin + step, span[1])]
                self.model(mx.array([ids]), cache=filled)
                mx.eval([entry.state for entry in filled if entry is not None])
        self._begun[kind] = (name, filled)
        return filled

    def _carrying(self, cache: list[Any], prompt: int, seen: int, steering: Steering | None) -> list[Any]:
        """Make a cache of one row carry its steering and where it stands in its prompt, whole: positions need it."""
        steerings = (*self.around, steering) if steering is not None else self.around
        row = Row(steerings, seen=seen, prompt=self.prompts[prompt], told=True, begun=seen > 0)
        ride(carrier(cache), SteeringState([row]))
        return cache


# -- the sweep -----------------------------------------------------------------------------------------------------


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
        layers: a layer, several, or ``"all"`` that the vector has; each is steered alone.
        strengths: in the unit; 0 is plain generation.
        at: which tokens.
        unit: ``"residual"``: a strength of 1 adds the direction with the layer's median norm; ``"raw"``: it adds the
            vector as it is. For ``"add_vector"`` only.
        intervention: what is done with the direction, by name; or a callable from a direction and a list of one
            strength to an intervention, which is to act at `at`.
        max_tokens: the most tokens to generate.
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
            several samples without sampling.
        KeyError: the vector lacks a layer.
        PositionError: a position means nothing in a prompt.
        NeverFired: a place's module doesn't run in this model's forward.
    """
    asked = _options({**options, "max_tokens": max_tokens, "temp": temp, "seed": seed}, samples, batch_size)
    strong = [number(s, "a strength") for s in np.atleast_1d(np.asarray(strengths))]
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
    decoder = _Decoder(model, tokens, list(steerings.values()), samples, asked)
    shape = (len(wanted), len(strong), len(given), samples)
    jobs = [_Job(cells, k, m, steering) for k, (cells, steering), m in
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
    step = given.get("prefill_step_size", 2048)
    counts = {"max_tokens": given["max_tokens"], "samples": samples, "batch_size": batch_size}
    knobs = {name: given[name] for name in _KNOBS if given.get(name) is not None}
    top_k = {"top_k": knobs["top_k"]} if "top_k" in knobs else {}
    for name, value in (counts | {"prefill_step_size": step} | top_k).items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} is a number from 1 on, not {value!r}.")
    for name, value in knobs.items():
        if name != "top_k" and not 0 <= number(value, name) <= 1:
            raise ValueError(f"{name} is a probability, from 0 to 1, not {value!r}.")
    if isinstance(given["seed"], bool) or not isinstance(given["seed"], (int, np.integer)) or given["seed"] < 0:
        raise ValueError(f"seed is a whole number from 0 on, not {given['seed']!r}.")
    temp = number(given["temp"], "temp")
    if temp < 0:
        raise ValueError(f"temp={temp}: a temperature is 0 (greedy) or more.")
    if not temp and samples > 1:
        raise ValueError(f"samples={samples} with temp=0 is {samples} times the same text: give temp=, such as 1.")
    if not temp and knobs:
        raise ValueError(f"{', '.join(knobs)} shapes what is drawn, and temp=0 draws nothing: give temp=, such as 1.")
    processors = list(given.get("logits_processors") or [])
    if bad := [one for one in processors if not callable(one)]:
        raise TypeError(f"logits_processors are functions of tokens and logits, not {bad[0]!r}.")
    return {
        "max_tokens": int(given["max_tokens"]),
        "temp": temp,
        "seed": int(given["seed"]),
        "knobs": knobs,
        "logprobs": bool(given.get("logprobs")),
        "logits_processors": processors,
        "prefill_step_size": int(step),
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
        steering = Steering.of(model._sites, {vector.site.format(layer=layer): edit}).row(0)
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
