"""Steered decoding on mlx-lm's own generators: the loop is theirs, the steering rides in the prompt cache."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import (
    BatchGenerator,
    GenerationResponse,
    generate_step,
    speculative_generate_step,
    stream_generate,
)
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxsteer.hooks import active, attached
from mlxsteer.plans import Plan
from mlxsteer.positions import Prompt, Tokens
from mlxsteer.sites import SiteMap
from mlxsteer.steering import SteeredCacheError, Steering, SteeringState, carrier, fresh_rows, ride, state_of


class Generation(str):
    """Generated text, with how it came about.

    Attributes:
        tokens: the generated token ids, without the end token.
        prompt_tokens: the prompt's token ids.
        finish_reason: ``"stop"`` (the model ended) or ``"length"``.
        logprobs: log-probability of each generated token, (tokens,); None unless asked for.
        touched: for each prompt and generated token, whether any intervention acted on it.
    """

    tokens: list[int]
    prompt_tokens: list[int]
    finish_reason: str | None
    logprobs: mx.array | None
    touched: list[bool]

    def __new__(
        cls,
        text: str,
        tokens: Sequence[int] = (),
        prompt_tokens: Sequence[int] = (),
        finish_reason: str | None = None,
        logprobs: mx.array | None = None,
        touched: Sequence[bool] = (),
    ) -> Generation:
        made = super().__new__(cls, text)
        made.tokens, made.prompt_tokens = list(tokens), list(prompt_tokens)
        made.finish_reason, made.logprobs, made.touched = finish_reason, logprobs, list(touched)
        return made


class NothingTouched(UserWarning):
    """A generation ended, and an intervention's positions lay nowhere in it."""


def outside() -> int:
    """The stack level of the first caller outside this package, so that a warning names the user's line."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == "mlxsteer":
        frame, level = frame.f_back, level + 1
    return level


def sampler_of(
    sampler: Callable[[mx.array], mx.array] | None, seed: int | None, options: Mapping[str, Any]
) -> Callable[[mx.array], mx.array] | None:
    """mlx-lm's sampler for the usual knobs, or the one given.

    Raises:
        ValueError: a sampler and knobs for one were given.
    """
    knobs = {name: value for name, value in options.items() if value is not None}
    if sampler is not None and knobs:
        raise ValueError(f"give a sampler or {', '.join(knobs)}, not both.")
    if seed is not None:
        mx.random.seed(seed)
    if sampler is None and knobs:
        if knobs.get("temp", 0.0) < 0:
            raise ValueError(f"temp={knobs['temp']}: a temperature is 0 (greedy) or more.")
        return make_sampler(**knobs)
    return sampler


def check_options(options: Mapping[str, Any], *, batch: bool) -> None:
    """Refuse a generation option that mlx-lm doesn't have, before anything runs.

    Raises:
        TypeError: with the nearest option there is.
    """
    sources = (BatchGenerator.__init__,) if batch else (generate_step, speculative_generate_step, stream_generate)
    known = {name for source in sources for name in inspect.signature(source).parameters}
    known -= {"self", "model", "prompt", "tokenizer", "stream", "kwargs", "stop_tokens"}
    ours = {"max_tokens", "temp", "top_p", "top_k", "min_p", "seed", "sampler", "logprobs", "interventions"}
    for name in options:
        if name not in known:
            near = "temp" if name == "temperature" else ", ".join(difflib.get_close_matches(name, known | ours, n=2))
            where = " for a list of prompts" if batch else ""
            raise TypeError(f"no generation option {name!r}{where}." + (f" Nearest: {near}." if near else ""))


def _prompt(tokens: Sequence[int], seen: int, decode: Callable[[list[int]], str] | None) -> Prompt:
    """A row's prompt: what a cache holds already, and these tokens."""
    return Prompt(seen + len(tokens), list(tokens) if not seen else None, decode)


def _prepare(
    model: nn.Module, cache: list[Any], steerings: tuple[Steering, ...], prompt: Callable[[int], Prompt]
) -> list[Any]:
    """Make a prompt cache carry a row's steerings.

    Raises:
        SteeredCacheError: it was filled under other ones.
    """
    state = state_of(cache)
    if state is None:
        (row,) = fresh_rows(cache, 1)
        state = SteeringState([row])
    else:
        (row,) = state.rows
        before = [s.fingerprint for s in row.steerings or ()]
        if row.seen and before != [s.fingerprint for s in steerings]:
            raise SteeredCacheError(
                "this prompt cache was filled under another steering: use it with the same interventions, or start a "
                "new cache."
            )
    row.steerings, row.prompt, row.told = steerings, prompt(row.seen), True
    ride(carrier(cache), state)
    return cache


def stream(
    sites: SiteMap,
    tokenizer: TokenizerWrapper,
    tokens: Sequence[int],
    steering: Steering | None,
    *,
    prompt_cache: list[Any] | None = None,
    max_kv_size: int | None = None,
    draft_model: nn.Module | None = None,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """mlx-lm's `stream_generate` on a model that is steered inside each step, and plain between two of them.

    Args:
        sites: the model's names.
        tokenizer: its tokenizer.
        tokens: the prompt.
        steering: what to do, after what surrounds this call does; None for nothing more.
        prompt_cache, max_kv_size, draft_model, options: as in mlx-lm.

    Raises:
        SteeredCacheError: the prompt cache was filled under another steering.
        NeverFired: a place of the steering never ran.
    """
    model = sites.model
    around = tuple(s for plan in active(model) if plan.adopt for s in plan.steerings)
    steerings = (*around, steering) if steering is not None else around
    if not steerings:
        yield from stream_generate(
            model, tokenizer, list(tokens), prompt_cache=prompt_cache, draft_model=draft_model,
            **({"max_kv_size": max_kv_size} if max_kv_size is not None else {}), **options,
        )  # fmt: skip
        return
    if prompt_cache is None:
        prompt_cache = make_prompt_cache(model, max_kv_size)
        if draft_model is not None:
            prompt_cache += make_prompt_cache(draft_model)
    _prepare(model, prompt_cache, steerings, lambda seen: _prompt(tokens, seen, tokenizer.decode))
    plan = Plan(sites, steerings=[steering] if steering is not None else ())
    pieces = stream_generate(
        model, tokenizer, list(tokens), prompt_cache=prompt_cache, draft_model=draft_model, **options
    )
    with closing(pieces):
        while True:
            with attached(plan):
                piece = next(pieces, None)
            if piece is None:
                break
            yield piece
    plan.check_fired()


def generate(
    sites: SiteMap, tokenizer: TokenizerWrapper, tokens: Sequence[int], steering: Steering | None, *,
    logprobs: bool = False, **options: Any,
) -> Generation:  # fmt: skip
    """One prompt, to the end; see `stream`."""
    around = [s for plan in active(sites.model) if plan.adopt for s in plan.steerings]
    text, made, chosen, reason = [], [], [], None
    cache = options.get("prompt_cache")
    seen = (state_of(cache) or SteeringState(fresh_rows(cache, 1))).rows[0].seen if cache else 0
    for piece in stream(sites, tokenizer, tokens, steering, **options):
        text.append(piece.text)
        reason = piece.finish_reason
        if reason != "stop":
            made.append(piece.token)
            if logprobs:
                chosen.append(piece.logprobs[piece.token])
    touched = _touched([*around, *([steering] if steering else [])], tokens, len(made), tokenizer, seen)
    taken = mx.stack(chosen) if chosen else (mx.zeros((0,)) if logprobs else None)
    return Generation("".join(text), made, tokens, reason, taken, touched)


def _text(tokenizer: TokenizerWrapper, tokens: Sequence[int]) -> str:
    """The text of generated tokens as a stream would have given it."""
    detokenizer = tokenizer.detokenizer
    for token in tokens:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return str(detokenizer.text)


def _touched(
    steerings: Sequence[Steering],
    tokens: Sequence[int],
    count: int,
    tokenizer: TokenizerWrapper,
    seen: int = 0,
) -> list[bool]:
    """Which tokens of a sequence any of the steerings acted on; warns of an intervention that acted on none."""
    width = len(tokens) + count
    row = Tokens([seen], [width], width, [_prompt(tokens, seen, tokenizer.decode)])
    touched = np.zeros(width, bool)
    for site, part in ((site, p) for s in steerings if s.strength for site, i in s.edits for p in i.parts()):
        if isinstance(part.strength, float) and not part.strength:
            continue
        marks = row.marks(0, part.at, part.schedule)
        if not marks.any():
            when = f"at={part.at.written()!r}" + (f" with schedule={part.schedule}" if part.schedule else "")
            message = f"{part.name} at {site.key} touched no token: {when} lies nowhere in {width} tokens."
            warnings.warn(message, NothingTouched, stacklevel=outside())
        touched |= marks
    return touched.tolist()


def generate_batch(
    sites: SiteMap,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Sequence[int]],
    steerings: Sequence[Steering | None],
    *,
    max_tokens: int | Sequence[int] = 256,
    logprobs: bool = False,
    max_kv_size: int | None = None,
    **options: Any,
) -> list[Generation]:
    """Several prompts in one continuous batch, each row with a steering of its own (or none).

    Args:
        sites: the model's names.
        tokenizer: its tokenizer.
        prompts: token ids, one list per row.
        steerings: one per row; a steering shared by rows is computed once for all of them.
        max_tokens: for all rows, or one per row.
        logprobs: keep each generated token's log-probability.
        max_kv_size, options: as in mlx-lm's `BatchGenerator`.
    """
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    if not sites.family.batch:
        return [
            generate(sites, tokenizer, p, s, max_tokens=n, logprobs=logprobs, max_kv_size=max_kv_size, **options)
            for p, s, n in zip(prompts, steerings, limits, strict=True)
        ]
    model = sites.model
    around = tuple(s for plan in active(model) if plan.adopt for s in plan.steerings)
    plan = Plan(sites, steerings=list({id(s): s for s in steerings if s is not None}.values()))
    caches = [make_prompt_cache(model, max_kv_size) for _ in prompts]
    for cache, tokens, steering in zip(caches, prompts, steerings, strict=True):
        own = (*around, steering) if steering is not None else around
        _prepare(model, cache, own, lambda seen, tokens=tokens: _prompt(tokens, seen, tokenizer.decode))  # type: ignore[misc]
    made: dict[int, list[int]] = {}
    chosen: dict[int, list[mx.array]] = {}
    reasons: dict[int, str | None] = {}
    generator = BatchGenerator(model, stop_tokens=[[t] for t in tokenizer.eos_token_ids], **options)
    with closing(generator), attached(plan):
        uids = generator.insert([list(p) for p in prompts], max_tokens=limits, caches=caches)
        made, chosen = {uid: [] for uid in uids}, {uid: [] for uid in uids}
        while responses := generator.next_generated():
            for response in responses:
                reasons[response.uid] = response.finish_reason
                if response.finish_reason != "stop":
                    made[response.uid].append(response.token)
                    if logprobs:
                        chosen[response.uid].append(response.logprobs[response.token])
    plan.check_fired()
    return [
        Generation(
            _text(tokenizer, made[uid]),
            made[uid],
            tokens,
            reasons.get(uid),
            (mx.stack(chosen[uid]) if chosen[uid] else mx.zeros((0,))) if logprobs else None,
            _touched([*around, *([steering] if steering else [])], tokens, len(made[uid]), tokenizer),
        )
        for uid, tokens, steering in zip(uids, prompts, steerings, strict=True)
    ]
