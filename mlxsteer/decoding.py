"""Rows that are decoded together, and what the prompts of several have in common, which runs once."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator, stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from mlxsteer.forks import forkable, forked
from mlxsteer.generation import Generation, _Multipliers, _room, _text, _touched
from mlxsteer.hooks import active, attached
from mlxsteer.interventions.gates import looks_back
from mlxsteer.model import InterpretableModel
from mlxsteer.plans import Plan
from mlxsteer.positions import Position, PositionError, Prompt
from mlxsteer.reading import SHORTEST_SHARED
from mlxsteer.steering import Row, Steering, SteeringState, carrier, ride, state_of

PREFILL_TOKENS = 16384
"""Prompts are prefilled together up to about so many tokens at a time, as mlx-lm does by default (8 × 2048)."""


class Draws:
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
class Job:
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


class Decoder:
    """Decodes rows over some prompts, each prompt's unedited beginning once.

    Args:
        model: the model.
        prompts: their token ids.
        steerings: everything that rows may carry.
        samples: rows that differ by their draws alone.
        options: what is asked of mlx-lm's generators: max_tokens, temp, seed, and the options of `generation_sweep`.

    Raises:
        PositionError: a position means nothing in a prompt.
        ValueError: a prompt leaves no learned position to generate at.
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
        self.most = [self._most(number, tokens) for number, tokens in enumerate(prompts)]
        cache = make_prompt_cache(self.model)
        # Whoever keeps one object twice in a cache wants both to move together, which copies don't.
        self.forks = forkable(cache) and len({id(entry) for entry in cache}) == len(cache)
        self.batches = self.sites.family.batch and all(hasattr(entry, "merge") for entry in cache)
        positions = {at for steering in steerings for at in steering.positions()}
        if any(looks_back(edit) for steering in steerings for _, edit in steering.edits):
            positions.add(Position.of("all"))  # spans and means see what isn't edited, too
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

    def _most(self, number: int, tokens: Sequence[int]) -> int:
        """How many tokens of a prompt's texts there are learned positions for, up to what was asked."""
        try:
            return _room([self.model], 0, len(tokens), self.options["max_tokens"])
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error

    def decoded(self, jobs: Iterable[Job], batch_size: int) -> Generator[tuple[Job, Generation], None, None]:
        """Rows and their texts, as they end. The model is plain, or as it is around this, whenever one is given."""
        with closing(self._batched(jobs, batch_size) if self.batches else self._single(jobs)) as ended:
            yield from map(self._ended, ended)

    def _ended(self, job: Job) -> tuple[Job, Generation]:
        """A row that has ended, and its text."""
        prompt = self.prompts[job.prompt].ids("a prompt")
        steerings = [*self.around, *([job.steering] if job.steering else [])]
        logprobs = None
        if self.options["logprobs"]:
            logprobs = mx.stack(job.logprobs) if job.logprobs else mx.zeros((0,))
        touched = _touched(self.sites, _Multipliers(steerings), prompt, job.tokens, self.tokenizer)
        text = _text(self.tokenizer, job.tokens)
        return job, Generation(text, job.tokens, prompt, job.reason, logprobs, touched)

    def _sampler(self, job: Job) -> Draws | None:
        options = self.options
        if not options["temp"]:
            return None
        return Draws((options["seed"], job.prompt, job.sample), options["temp"], options["knobs"])

    def _batched(self, jobs: Iterable[Job], batch_size: int) -> Generator[Job, None, None]:
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
        running: dict[int, Job] = {}
        carried: dict[int, Steering] = {}
        plan = Plan(self.sites)
        with closing(generator):
            while True:
                for job in itertools.islice(waiting, batch_size - len(running)):
                    cache, seen, rest = self._begin(job)
                    (uid,) = generator.insert(
                        [rest], [self.most[job.prompt]], [cache], [seen], samplers=[self._sampler(job)]
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

    def _single(self, jobs: Iterable[Job]) -> Generator[Job, None, None]:
        """Row by row, where rows of a batch would decode otherwise than alone."""
        options = self.options
        for job in jobs:
            cache, _, rest = self._begin(job)
            plan = Plan(self.sites, steerings=[job.steering] if job.steering else [])
            pieces = stream_generate(
                self.model, self.tokenizer, rest, prompt_cache=cache, max_tokens=self.most[job.prompt],
                sampler=self._sampler(job), logits_processors=options["logits_processors"],
                prefill_step_size=options["prefill_step_size"],
            )  # fmt: skip
            with closing(pieces), attached(plan):
                for piece in pieces:
                    job.take(piece, options["logprobs"])
            plan.check_fired()
            yield job

    def _begin(self, job: Job) -> tuple[list[Any], list[int], list[int]]:
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
        if (state := state_of(cache)) is not None:  # what gates and spans remember of the tokens before
            row.memory = state.rows[0].copy().memory
        ride(carrier(cache), SteeringState([row]))
        return cache
