"""Steered decoding on mlx-lm's own generators: the loop is theirs, the steering rides in the prompt cache."""

from __future__ import annotations

import difflib
import functools
import inspect
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
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

from mlxsteer import families
from mlxsteer.hooks import active, attached
from mlxsteer.plans import Plan
from mlxsteer.positions import PositionError, Prompt, Tokens
from mlxsteer.sites import SiteMap
from mlxsteer.steering import (
    Row,
    SteeredCacheError,
    Steering,
    SteeringState,
    carrier,
    fresh_rows,
    remember,
    ride,
    state_of,
)
from mlxsteer.touched import Touch, Touched, dynamic, measured, told


class Generation(str):
    """Generated text, with how it came about.

    Attributes:
        tokens: the generated token ids, without the end token.
        prompt_tokens: the prompt's token ids.
        finish_reason: ``"stop"`` (the model ended) or ``"length"``.
        logprobs: log-probability of each generated token, (tokens,); None unless asked for.
        touched: for each prompt and generated token, whether any intervention acted on it, and how much; see `Touched`.
    """

    tokens: list[int]
    prompt_tokens: list[int]
    finish_reason: str | None
    logprobs: mx.array | None
    touched: Touched

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
        made.finish_reason, made.logprobs = finish_reason, logprobs
        made.touched = touched if isinstance(touched, Touched) else Touched(touched)
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
    known |= set() if batch else {"cached_tokens"}
    ours = {"max_tokens", "temp", "top_p", "top_k", "min_p", "seed", "sampler", "logprobs", "interventions"}
    for name in options:
        if name not in known:
            near = "temp" if name == "temperature" else ", ".join(difflib.get_close_matches(name, known | ours, n=2))
            where = " for a list of prompts" if batch else ""
            raise TypeError(f"no generation option {name!r}{where}." + (f" Nearest: {near}." if near else ""))


def _prompt(
    tokens: Sequence[int], seen: int, decode: Callable[[list[int]], str] | None, earlier: Sequence[int] | None = None
) -> Prompt:
    """A row's prompt: what a cache holds already (`earlier`, where it is known), and these tokens."""
    if not seen or earlier is not None:
        return Prompt(seen + len(tokens), [*(earlier or ()), *tokens], decode)

    def unknown() -> list[int]:
        raise PositionError(
            f"after(...) and callables look at the prompt's token ids, and this prompt cache holds {seen} tokens that "
            "other code filled it with: say which, as model.generate(..., cached_tokens=ids)."
        )

    return Prompt(seen + len(tokens), None, decode, source=unknown)


def _held(cache: Sequence[Any] | None, cached_tokens: Sequence[int] | None, steered: bool) -> Row:
    """What a prompt cache of one row holds; a copy, where the cache carries a state.

    Args:
        cache: the prompt cache, if there is one.
        cached_tokens: what the caller tells of it.
        steered: positions in it matter.

    Raises:
        SteeredCacheError: nobody knows how many tokens, and they matter.
        ValueError: it has several rows, or `cached_tokens` can't be what it holds.
    """
    if not cache:
        if cached_tokens is not None:
            raise ValueError("cached_tokens= are the ids that prompt_cache= holds, and none is given.")
        return Row()
    told = None if cached_tokens is None else [int(t) for t in cached_tokens]
    state = state_of(cache)
    try:
        rows = state.rows if state is not None else fresh_rows(cache, 1, told or ())
    except SteeredCacheError:
        if steered:
            raise
        return Row()
    if len(rows) != 1:
        raise ValueError(f"this prompt cache holds {len(rows)} rows: generate goes on from a cache of one.")
    row = rows[0].copy()
    if told is not None:
        if len(told) != row.seen or row.known() not in (None, told):
            raise ValueError(
                f"cached_tokens= are {len(told)} ids, and the prompt cache holds {row.seen} "
                f"{'others' if len(told) == row.seen else 'tokens'}: give the ids of all that it holds, in order."
            )
        row.tokens = tuple(told)
    return row


def _prepare(cache: list[Any], steerings: tuple[Steering, ...], prompt: Prompt, held: Row) -> Row:
    """Make a prompt cache of one row carry its steerings; nothing is changed where they are refused.

    Args:
        cache: the prompt cache.
        steerings: what steers the row.
        prompt: its prompt, with what the cache holds.
        held: what the cache holds, see `_held`.

    Returns:
        The row as the cache carries it from now on.

    Raises:
        SteeredCacheError: it was filled under other ones.
        PositionError: a position means nothing here, or lies wholly in what was filled without them.
    """
    before = (held.steerings if held.steered else None) or ()
    if before and [s.fingerprint for s in before] != [s.fingerprint for s in steerings]:
        raise SteeredCacheError(
            "this prompt cache was filled under another steering: use it with the same interventions, or start a "
            "new cache."
        )
    clean = held.clean if before else held.seen
    row = replace(held, steerings=steerings, prompt=prompt, told=True, memory={}, passed=None, clean=clean)
    row.note(outside())
    state = state_of(cache) or SteeringState([row])
    state.rows = [row]
    ride(carrier(cache), state)
    return row


def stream(
    sites: SiteMap,
    tokenizer: TokenizerWrapper,
    tokens: Sequence[int],
    steering: Steering | None,
    *,
    prompt_cache: list[Any] | None = None,
    cached_tokens: Sequence[int] | None = None,
    max_kv_size: int | None = None,
    draft_model: nn.Module | None = None,
    max_tokens: int = 256,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """mlx-lm's `stream_generate` on a model that is steered inside each step, and plain between two of them.

    Args:
        sites: the model's names.
        tokenizer: its tokenizer.
        tokens: the prompt.
        steering: what to do, after what surrounds this call does; None for nothing more.
        cached_tokens: the ids of the tokens that `prompt_cache` holds, where other code filled it.
        max_tokens: the most tokens; fewer where a model's learned positions end before.
        prompt_cache, max_kv_size, draft_model, options: as in mlx-lm.

    Raises:
        SteeredCacheError: the prompt cache was filled under another steering.
        PositionError: a position means nothing here, or lies wholly in what the cache holds, filled without it.
        ValueError: the prompt leaves no learned position to generate at, or `cached_tokens` isn't what the cache holds.
        NeverFired: a place of the steering never ran.
    """
    model = sites.model
    around = tuple(s for plan in active(model) if plan.adopt for s in plan.steerings)
    steerings = (*around, steering) if steering is not None else around
    held = _held(prompt_cache, cached_tokens, bool(steerings))
    options["max_tokens"] = _room([model, draft_model], held.seen, len(tokens), max_tokens)
    if not steerings:
        if max_kv_size is not None:
            options["max_kv_size"] = max_kv_size
        pieces = stream_generate(
            model, tokenizer, list(tokens), prompt_cache=prompt_cache, draft_model=draft_model, **options
        )
        known = held.known() if "input_embeddings" not in options else None
        yield from pieces if prompt_cache is None or known is None else _remembered(pieces, prompt_cache, known, tokens)
        return
    if prompt_cache is None:
        prompt_cache = make_prompt_cache(model, max_kv_size)
        if draft_model is not None:
            prompt_cache += make_prompt_cache(draft_model)
    known = held.known()
    row = _prepare(prompt_cache, steerings, _prompt(tokens, held.seen, tokenizer.decode, known), held)
    plan = Plan(sites, steerings=[steering] if steering is not None else ())
    pieces = stream_generate(
        model, tokenizer, list(tokens), prompt_cache=prompt_cache, draft_model=draft_model, **options
    )
    whole = [*(known or ()), *tokens]
    try:
        with closing(pieces):
            while True:
                with attached(plan):
                    piece = next(pieces, None)
                if piece is None:
                    break
                whole.append(piece.token)
                yield piece
    finally:
        if known is not None:
            row.tokens = tuple(whole[: row.seen])
    plan.check_fired()


def _remembered(
    pieces: Generator[GenerationResponse, None, None], cache: list[Any], known: Sequence[int], tokens: Sequence[int]
) -> Iterator[GenerationResponse]:
    """Plain generation into a prompt cache, which knows its tokens afterwards: a steering may ask for them."""
    whole, between = [*known, *tokens], False
    try:
        with closing(pieces):
            for piece in pieces:
                whole.append(piece.token)
                between = True
                yield piece
                between = False
        between = True
    finally:
        # mlx-lm has fed every token that it handed out; nobody knows what it had fed when it was broken off
        offset = next((c.offset for c in cache if hasattr(c, "offset")), len(whole))
        if between and isinstance(offset, int) and offset <= len(whole):
            remember(carrier(cache), whole[:offset])


def _room(models: Iterable[nn.Module | None], seen: int, count: int, max_tokens: int) -> int:
    """How many tokens there are learned positions for, up to `max_tokens`.

    Raises:
        ValueError: for none.
    """
    tables = [n for model in models if model is not None and (n := _learned_positions(model)) is not None]
    if not tables:
        return max_tokens
    room = min(tables) - seen - count  # mlx-lm feeds the last generated token too
    if room < 1:
        held = f" behind the {seen} that the prompt cache holds" if seen else ""
        raise ValueError(
            f"the prompt has {count} tokens{held}, and the model has {min(tables)} learned positions, behind which "
            f"there is nothing to read: give at most {max(min(tables) - seen - 1, 0)}, so that one can be generated."
        )
    return room if max_tokens < 0 else min(max_tokens, room)


def _learned_positions(model: nn.Module) -> int | None:
    """The length of the table that a model looks its positions up in, as GPT-2 does; None where it has none."""
    for module in (model, *model.children().values()):
        for name in families.LEARNED_POSITIONS if isinstance(module, nn.Module) else ():
            if isinstance(table := module.get(name), (nn.Embedding, nn.QuantizedEmbedding)):
                return int(table.weight.shape[0])
    return None


def generate(
    sites: SiteMap, tokenizer: TokenizerWrapper, tokens: Sequence[int], steering: Steering | None, *,
    logprobs: bool = False, **options: Any,
) -> Generation:  # fmt: skip
    """One prompt, to the end; see `stream`."""
    around = [s for plan in active(sites.model) if plan.adopt for s in plan.steerings]
    text, made, chosen, reason = [], [], [], None
    held = _held(options.get("prompt_cache"), options.get("cached_tokens"), steered=False)
    earlier = held.known()
    for piece in stream(sites, tokenizer, tokens, steering, **options):
        text.append(piece.text)
        reason = piece.finish_reason
        if reason != "stop":
            made.append(piece.token)
            if logprobs:
                chosen.append(piece.logprobs[piece.token])
    acting = [*around, *([steering] if steering else [])]
    touched = _touched(sites, acting, tokens, made, tokenizer, held.seen, earlier)
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
    sites: SiteMap,
    steerings: Sequence[Steering],
    tokens: Sequence[int],
    made: Sequence[int],
    tokenizer: TokenizerWrapper,
    seen: int = 0,
    earlier: Sequence[int] | None = None,
) -> Touched:
    """Which tokens of a sequence any of the steerings acted on; warns of an intervention that acted on none."""
    width = len(tokens) + len(made)
    row = Tokens([seen], [width], width, [_prompt(tokens, seen, tokenizer.decode, earlier)])
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
    acting = told(steerings)
    text = [*tokens, *made]

    def measure() -> list[Touch]:
        if seen:
            raise ValueError(
                f"how much was touched isn't known: {seen} tokens came from a prompt cache, and the text can't be run "
                "again without them."
            )
        return measured(sites, acting, text, len(tokens), tokenizer.decode)

    unknown = any(dynamic(edit) for steering in acting for _, edit in steering.edits) and not seen
    pieces = functools.partial(_pieces, tokenizer, text)
    return Touched(None if unknown else touched.tolist(), pieces, len(tokens), measure)


def _pieces(tokenizer: TokenizerWrapper, tokens: Sequence[int]) -> list[str]:
    """The text of each token; that of a character in several tokens lies with its last one."""
    detokenizer = tokenizer.detokenizer
    detokenizer.reset()
    pieces = []
    for token in tokens:
        detokenizer.add_token(token)
        pieces.append(detokenizer.last_segment)
    detokenizer.finalize()
    if pieces:
        pieces[-1] += detokenizer.last_segment
    return pieces


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
        max_tokens: for all rows, or one per row; fewer where a model's learned positions end before.
        logprobs: keep each generated token's log-probability.
        max_kv_size, options: as in mlx-lm's `BatchGenerator`.
    """
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    limits = [_room([sites.model], 0, len(p), n) for p, n in zip(prompts, limits, strict=True)]
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
        _prepare(cache, own, _prompt(tokens, 0, tokenizer.decode), Row())
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
            _touched(sites, [*around, *([steering] if steering else [])], tokens, made[uid], tokenizer),
        )
        for uid, tokens, steering in zip(uids, prompts, steerings, strict=True)
    ]
