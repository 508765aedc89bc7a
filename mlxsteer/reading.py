"""Activations of many texts, batch by batch: what the two sides of a pair share runs once, and nothing behind the last
block that is read runs at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlxsteer.forks import forkable, forked
from mlxsteer.hooks import activation, attached, detached, residents, surrounding
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import ContrastPair, check_switch, hint
from mlxsteer.plans import Plan, Stopped
from mlxsteer.positions import At, Position, Prompt, Tokens
from mlxsteer.progress import Step, reporting
from mlxsteer.sites import Site, UnknownKey
from mlxsteer.trace import frozen

Read: TypeAlias = "str | int | Callable[[list[int]], Any]"
"""Which tokens of a text are read: ``"last"``, ``"first"`` or ``"mean"`` (of the completion), ``"all"`` (the mean over
every token but BOS), the index of a token, or a callable from token ids to one index or several (their mean)."""

_COMPLETION = {"mean": "averages over", "first": "reads the first token of"}
"""What is read of a completion, and of no other text."""

SHORTEST_SHARED = 4
"""Fewer tokens in common are not worth a forward of their own."""


@dataclass(frozen=True)
class Text:
    """A text as tokens.

    Attributes:
        tokens: its token ids.
        prompt: how many of them, from the start, are prompt; those after them are the completion.
    """

    tokens: list[int]
    prompt: int


@dataclass(frozen=True)
class Batch:
    """Texts that are run together.

    Attributes:
        texts: their numbers; where `shared` is not 0, the second half are the partners of the first, in order.
        shared: number of leading tokens that partners have in common, run once for both.
    """

    texts: list[int]
    shared: int = 0


# -- texts ---------------------------------------------------------------------------------------------------------


def encode_side(model: InterpretableModel, pair: ContrastPair, side: str) -> tuple[list[int], int]:
    """Token ids of a pair's prompt with one of its sides, and how many of them are prompt.

    Args:
        model: the model, with its chat template for pairs that are chats.
        pair: the pair.
        side: ``"positive"`` or ``"negative"``.

    Returns:
        The tokens, and a number of at least 1: what a completion's token is scored by is the token before it.

    Raises:
        ValueError: the pair is a chat, and the model has no chat template; the text is longer than the model's table
            of positions, or has half a character.
    """
    text = _side(model, pair, side)
    return text.tokens, max(text.prompt, 1)


def encode_pairs(
    model: InterpretableModel, pairs: Sequence[ContrastPair], chosen: Sequence[ContrastPair], chat: bool
) -> list[tuple[Text, Text]]:
    """Both sides of pairs, to be read; a completion without a prompt begins at token 0, or behind BOS.

    Args:
        model: the model.
        pairs: all pairs that were given: a refusal says which of them it is.
        chosen: those of them that are read.
        chat: prompts are a user's messages.

    Raises:
        ValueError: as in `encode_side`.
    """
    encoded = []
    for pair in chosen:
        texts = []
        for side in ("positive", "negative"):
            try:
                texts.append(_side(model, as_chat(pair) if chat else pair, side))
            except (TypeError, ValueError) as error:
                number = next(i for i, one in enumerate(pairs) if one is pair)
                raise type(error)(f"pair {number}, {side} side: {error}") from error
        encoded.append((texts[0], texts[1]))
    return encoded


def _side(model: InterpretableModel, pair: ContrastPair, side: str) -> Text:
    completion = getattr(pair, side)
    _check_whole([pair.prompt, completion, *(message["content"] for message in pair.messages)])
    if pair.chat or pair.messages:
        said = list(pair.messages) or [{"role": "user", "content": pair.prompt or completion}]
        tokens = model.encode(said)
        if not (pair.prompt or pair.messages):  # the sides are messages themselves: all of it is prompt
            return Text(tokens, len(tokens))
        assert model.tokenizer is not None
        whole = [*tokens, *model.tokenizer.encode(completion, add_special_tokens=False)]
        model._check_length(len(whole))
        return Text(whole, len(tokens))
    tokens = model.encode(pair.prompt + completion)
    alone = model.encode(pair.prompt) if pair.prompt else [bos_of(model)]
    return Text(tokens, min(_common(tokens, alone), len(tokens) - 1))


def _check_whole(texts: Iterable[str]) -> None:
    if any(re.search("[\ud800-\udfff]", text) for text in texts):
        raise ValueError("it has half a character (a lone surrogate), which no tokenizer reads.")


def encode_text(model: InterpretableModel, text: Any, *, chat: bool = False) -> Text:
    """One text, token ids or a chat, all of it prompt; with ``chat``, a text is a user's message."""
    if isinstance(text, str):
        _check_whole([text])
    tokens = model.encode([{"role": "user", "content": text}] if chat and isinstance(text, str) else text)
    return Text(tokens, len(tokens))


def encode_texts(model: InterpretableModel, texts: Any, name: str, *, chat: bool = False) -> list[Text]:
    """Texts, each all prompt.

    Args:
        model: the model.
        texts: texts, lists of token ids, or chats.
        name: what to call them in a refusal.
        chat: texts are a user's messages.

    Raises:
        TypeError: they are no list, or one of them is no text; its number is said.
        ValueError: there are none, or one can't be encoded.
    """
    if isinstance(texts, (str, Mapping)):
        raise TypeError(f"{name} is a list of texts, not one {type(texts).__name__}: one text is [text].")
    if not isinstance(texts, Iterable):
        raise TypeError(f"{name} is a list of texts, not {texts!r:.80}.")
    encoded = []
    for number, text in enumerate(texts):
        try:
            encoded.append(encode_text(model, text, chat=chat))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}, text {number}: {error}") from error
    if not encoded:
        raise ValueError(f"{name} is empty, there are no texts: give at least one.")
    return encoded


def bos_of(model: InterpretableModel) -> int | None:
    """The beginning-of-sequence token's id, where there is one."""
    return getattr(model.tokenizer, "bos_token_id", None) if model.tokenizer is not None else None


def _common(a: Sequence[int], b: Sequence[int | None]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# -- what was given --------------------------------------------------------------------------------------------------


def check_model(model: Any) -> None:
    """Refuse what is no model.

    Raises:
        TypeError: it is no `InterpretableModel`.
    """
    if not isinstance(model, InterpretableModel):
        given = repr(model) if isinstance(model, str) or model is None else type(model).__name__
        raise TypeError(f"model is an InterpretableModel, such as InterpretableModel('pocket'), not {given}.")


def check_budget(batch_tokens: Any) -> None:
    """Refuse what is no number of tokens.

    Raises:
        ValueError: it is no whole number from 1 on.
    """
    if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, (int, np.integer)) or batch_tokens < 1:
        raise ValueError(f"batch_tokens is a number of tokens from 1 on, not {batch_tokens!r}.")


def check_progress(progress: Any) -> None:
    """Refuse what is no way to tell progress.

    Raises:
        TypeError: it is neither True, False, None nor a function.
    """
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress is True, False or a function, not {progress!r}.")


def _keys(keys: Any) -> list[str]:
    given = [keys] if isinstance(keys, str) else list(keys) if isinstance(keys, Iterable) else [keys]
    if wrong := [key for key in given if not isinstance(key, str)]:
        raise TypeError(f"keys are a key such as 'layers.5', or a list of keys, not {wrong[0]!r}.")
    if not given:
        raise ValueError("there are no keys: give at least one, such as 'layers.5'.")
    return given


def check_widths(sites: Sequence[Site], widths: Sequence[int | None]) -> None:
    """Refuse places of several widths, which make no one vector; None is a width that isn't known yet.

    Raises:
        ValueError: with two of the places and their widths.
    """
    known = [(site, width) for site, width in zip(sites, widths, strict=True) if width is not None]
    for site, width in known[1:]:
        if width != known[0][1]:
            raise ValueError(
                f"{known[0][0].key} has {known[0][1]} features and {site.key} {width}, and a vector is of one width: "
                "extract layers of one width at a time."
            )


def check_finite(sites: Sequence[Site], finite: Iterable[Any]) -> None:
    """Refuse activations that are no numbers.

    Raises:
        ValueError: with the first of the places where not all are finite.
    """
    for site, sound in zip(sites, finite, strict=True):
        if not np.all(sound):
            raise ValueError(f"the activations at {site.key} hold NaN or infinite values: nothing comes of them.")


# -- which tokens are read -----------------------------------------------------------------------------------------


def check_read(read: Any) -> None:
    """Refuse what names no token.

    Raises:
        ValueError: it is none of the names, no index and no callable.
    """
    names = ("last", "first", "mean", "all")
    named = isinstance(read, str) and read in names
    whole = isinstance(read, (int, np.integer)) and not isinstance(read, bool)
    if not (named or whole or callable(read)):
        raise ValueError(
            f"read is 'last', 'first', 'mean', 'all', the index of a token, or a callable from token ids to indices, "
            f"not {read!r}.{hint(read, names)}"
        )


def check_completions(read: Read, pairs: Sequence[ContrastPair], chosen: Sequence[ContrastPair]) -> None:
    """Refuse an empty completion where the completion is what is read.

    Args:
        read: what is read.
        pairs: all pairs that were given: the refusal says which of them it is.
        chosen: those of them that are read.

    Raises:
        ValueError: there is no completion to read.
    """
    if not isinstance(read, str) or read not in _COMPLETION:
        return
    for pair in chosen:
        if not (pair.positive and pair.negative):
            number = next(i for i, one in enumerate(pairs) if one is pair)
            side = "negative" if pair.positive else "positive"
            raise ValueError(
                f"pair {number}: read={read!r} {_COMPLETION[read]} a completion, and its {side} one is empty; "
                "read='last' reads what there is."
            )


def reading(read: Read, text: Text, bos: int | None) -> np.ndarray:
    """How much each token of a text counts, (tokens,) float32; they sum to 1.

    Raises:
        ValueError: there is no such token, or no completion to read.
    """
    length = len(text.tokens)
    if read in ("mean", "first"):
        if text.prompt >= length:
            instead = "read='all' averages over all of a text" if read == "mean" else "read='last' reads the last token"
            raise ValueError(
                f"read={read!r} {_COMPLETION[str(read)]} a completion, and these texts are all prompt: {instead}."
            )
        chosen: Any = range(text.prompt, length) if read == "mean" else [text.prompt]
    elif read == "all":
        start = int(text.tokens[0] == bos and length > 1)
        chosen = range(start, length)
    elif read == "last":
        chosen = [-1]
    elif callable(read):
        found: Any = np.asarray(read(list(text.tokens)))
        mask = found.dtype == bool and found.shape == (length,)
        chosen = np.flatnonzero(found).tolist() if mask else np.atleast_1d(found).tolist()
        if not len(chosen) or any(not isinstance(index, int) or isinstance(index, bool) for index in chosen):
            raise ValueError(
                f"read: the callable gave {found.tolist()!r} for a text of {length} tokens; it gives one index or "
                "several, or True and False for each token."
            )
    else:
        chosen = [int(read)]
    weights = np.zeros(length, np.float32)
    for index in chosen:
        if not -length <= index < length:
            what = f"read= gave index {index}, and" if callable(read) else f"read={index}:"
            raise ValueError(f"{what} a text has only {length} tokens.")
        weights[index] += 1 / len(chosen)
    return weights


# -- batches -------------------------------------------------------------------------------------------------------


def single_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of rows of similar length, so that each padded batch holds at most `budget` tokens, or is one row."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pair_batches(
    texts: Sequence[Text], partners: Sequence[tuple[int, int]], earliest: Sequence[int], budget: int
) -> Iterator[Batch]:
    """Pairs in batches of similar shared beginnings and lengths, each padded batch at most `budget` tokens.

    Args:
        texts: the texts.
        partners: numbers of the two texts of each pair.
        earliest: for each text the first token that is read: the shared beginning ends before it.
        budget: tokens; a batch of one pair may exceed it.
    """
    shared = []
    for a, b in partners:
        common = min(_common(texts[a].tokens, texts[b].tokens), len(texts[a].tokens) - 1, len(texts[b].tokens) - 1)
        shared.append(min(common, earliest[a], earliest[b]))
    shared = [count if count >= SHORTEST_SHARED else 0 for count in shared]
    longest = [max(len(texts[a].tokens), len(texts[b].tokens)) for a, b in partners]
    group: list[int] = []

    def batch() -> Batch:
        first, second = zip(*(partners[i] for i in group), strict=True)
        return Batch([*first, *second], shared[group[0]])

    for index in sorted(range(len(partners)), key=lambda i: (shared[i], longest[i])):
        # The rest of a longer shared beginning would run twice: not too much of it.
        apart = group and shared[index] > 1.25 * shared[group[0]] + SHORTEST_SHARED * bool(shared[group[0]])
        width = max(longest[i] for i in [*group, index])
        if group and (apart or 2 * (len(group) + 1) * width > budget):
            yield batch()
            group = []
        group.append(index)
    if group:
        yield batch()


# -- forwards ------------------------------------------------------------------------------------------------------


class Reader:
    """Reads a model's activations at some places, a batch of texts at a time.

    Args:
        model: the model.
        sites: the places; each an activation of three axes, (batch, tokens, features).
        norms: also give the norms of the activations at every real token but BOS.
    """

    def __init__(self, model: InterpretableModel, sites: Sequence[Site], *, norms: bool = False) -> None:
        self.model, self.sites, self.norms = model, list(dict.fromkeys(sites)), norms
        self.bos = bos_of(model)
        family = model._sites.family
        self.together = family.batch
        self.outer = [(plan, frozen(plan)) for plan in surrounding(model.model) if plan.keep is None]
        self.steered = bool(self.outer or residents(model.model))
        layers = [site.layer for site in self.sites]
        # Steerings around this reading must see every block; else nothing behind the last place needs to run.
        self.stop = None
        if all(layer is not None for layer in layers) and not self.steered:
            self.stop = model._sites.resolve(f"layers.{max(layer for layer in layers if layer is not None)}")
        self.forks = family.replay and family.batch and forkable(make_prompt_cache(model.model))

    def __call__(
        self, texts: Sequence[Text], weights: Sequence[np.ndarray], batch: Batch
    ) -> tuple[mx.array, mx.array | None]:
        """Staged: the activations read, (places, rows, features) float32, and norms, (places, tokens), if asked for."""
        taken, norms = self.each(texts, weights, batch)
        check_widths(self.sites, [rows.shape[-1] for rows in taken])
        return mx.stack(taken), norms

    def each(
        self, texts: Sequence[Text], weights: Sequence[np.ndarray], batch: Batch
    ) -> tuple[list[mx.array], mx.array | None]:
        """The same with an array for each place, (rows, features): places may differ in width."""
        rows = [texts[i] for i in batch.texts]
        chosen = [weights[i] for i in batch.texts]
        if not self.together:
            parts = [self._plain([row], [weight]) for row, weight in zip(rows, chosen, strict=True)]
            return _joined(parts)
        if batch.shared and self.forks and not (self.steered and _prompts_differ(rows)):
            return self._forked(rows, chosen, batch.shared)
        return self._plain(rows, chosen)

    def everywhere(self, texts: Sequence[Text], real: Sequence[Text]) -> tuple[list[mx.array], mx.array | None]:
        """Staged: the activations of texts of one length at every token, (texts, tokens, features) float32 for each
        place, in one forward; and norms at the tokens of `real`, the texts without their padding, if asked for."""
        parts = []
        for rows in [[i] for i in range(len(texts))] if not self.together else [list(range(len(texts)))]:
            captured = self._forward([texts[i] for i in rows], 0, len(texts[0].tokens), None)
            norms = self._norms(captured, [real[i] for i in rows], 0)
            parts.append(([self._value(captured, site).astype(mx.float32) for site in self.sites], norms))
        return _joined(parts)

    def _plain(self, rows: list[Text], weights: list[np.ndarray]) -> tuple[list[mx.array], mx.array | None]:
        captured = self._forward(rows, 0, max(len(row.tokens) for row in rows), None)
        return self._reduce(captured, rows, weights, 0)

    def _forked(
        self, rows: list[Text], weights: list[np.ndarray], shared: int
    ) -> tuple[list[mx.array], mx.array | None]:
        """The shared beginning once, then both sides from a copy of its cache."""
        half = len(rows) // 2
        cache: Any = make_prompt_cache(self.model.model)
        captured = self._forward(rows[:half], 0, shared, cache)
        norms = self._norms(captured, [Text(row.tokens[:shared], shared) for row in rows[:half]], 0)
        captured.clear()
        width = max(len(row.tokens) for row in rows) - shared
        captured = self._forward(rows, shared, width, forked(cache, half, 2))
        taken, own = self._reduce(captured, rows, weights, shared)
        if norms is None or own is None:
            return taken, None
        return taken, mx.concatenate([norms, norms, own], axis=1)  # each side has the shared tokens

    def _forward(self, rows: list[Text], start: int, width: int, cache: Any) -> dict[Site, Any]:
        """One forward over tokens `start` to `start + width` of each row, padded at the end."""
        pieces = [row.tokens[start : start + width] for row in rows]
        ids = mx.array([[*piece, *[0] * (width - len(piece))] for piece in pieces])
        decode = self.model.tokenizer.decode if self.model.tokenizer is not None else None
        ends = [max(row.prompt, 1) for row in rows]  # for the steerings around: generation begins behind some token
        prompts = [Prompt(end, row.tokens[:end], decode) for row, end in zip(rows, ends, strict=True)]
        tokens = Tokens([start] * len(rows), [len(piece) for piece in pieces], width, prompts)
        plan = Plan(self.model._sites, capture=self.sites, tokens=tokens, stop=self.stop)
        if self.stop is not None:
            plan._hook(self.stop)  # the block itself need not be a place that is read
        with detached(), attached(*(plan for _, plan in self.outer), plan), suppress(Stopped):
            self.model.model(ids, cache=cache)
        for around, inner in self.outer:
            around.ran |= inner.ran
            around.forwards += 1
        plan.check_fired()
        captured, plan.captured = plan.captured, {}
        return captured

    def _reduce(
        self, captured: dict[Site, Any], rows: list[Text], weights: list[np.ndarray], start: int
    ) -> tuple[list[mx.array], mx.array | None]:
        norms = self._norms(captured, rows, start)
        own = [weight[start:] for weight in weights]
        if all(np.count_nonzero(weight) == 1 for weight in own):
            index = mx.array([int(np.flatnonzero(weight)[0]) for weight in own])
            row = mx.arange(len(rows))
            taken = [self._value(captured, site)[row, index].astype(mx.float32) for site in self.sites]
        else:
            width = max(map(len, own))
            weight = mx.array(np.stack([np.pad(w, (0, width - len(w))) for w in own]))[:, None]
            taken = [(weight @ self._value(captured, site).astype(mx.float32))[:, 0] for site in self.sites]
        captured.clear()  # so that an activation's memory is free once it is read
        return taken, norms

    def _value(self, captured: dict[Site, Any], site: Site) -> mx.array:
        value = activation(captured[site], site)
        if value.ndim != 3:
            raise ValueError(
                f"{site.key} has shape {value.shape}: a vector is read where activations are (batch, tokens, features)."
            )
        return value

    def _norms(self, captured: dict[Site, Any], rows: list[Text], start: int) -> mx.array | None:
        if not self.norms:
            return None
        width = self._value(captured, self.sites[0]).shape[1]
        real = [
            row * width + token - start
            for row, text in enumerate(rows)
            for token in range(start, len(text.tokens))
            if token or text.tokens[0] != self.bos
        ]
        chosen = mx.array(real, dtype=mx.int32)
        wide = (self._value(captured, site).astype(mx.float32) for site in self.sites)
        return mx.stack([mx.sqrt(mx.sum(x * x, axis=-1)).reshape(-1)[chosen] for x in wide])


def _joined(parts: list[tuple[list[mx.array], mx.array | None]]) -> tuple[list[mx.array], mx.array | None]:
    taken = [mx.concatenate(list(rows)) for rows in zip(*(values for values, _ in parts), strict=True)]
    norms = [norm for _, norm in parts if norm is not None]
    return taken, mx.concatenate(norms, axis=1) if norms else None


def _prompts_differ(rows: Sequence[Text]) -> bool:
    """Whether partners have prompts of their own: a steering's positions, told by the prompt, are then not the same."""
    half = len(rows) // 2
    return any(a.tokens[: a.prompt] != b.tokens[: b.prompt] for a, b in zip(rows[:half], rows[half:], strict=True))


def as_chat(pair: ContrastPair) -> ContrastPair:
    """The pair with its prompt as a user's message."""
    return pair if pair.chat or pair.messages else replace(pair, chat=True)


# -- activations of texts ------------------------------------------------------------------------------------------


def activations(
    model: InterpretableModel,
    texts: Iterable[Any],
    keys: str | Sequence[str],
    *,
    read: Read = "last",
    chat: bool = False,
    batch_tokens: int = 4096,
    progress: bool | Step | None = False,
) -> dict[str, mx.array]:
    """The activation of many texts at one token each (or averaged over several), at some places.

    Args:
        model: the model.
        texts: texts, lists of token ids, or chats.
        keys: keys, globs or ranges, of places with (batch, tokens, features).
        read: which token, as in `extract`; a text is all prompt, so that there is no completion to read.
        chat: texts are a user's messages.
        batch_tokens: the most tokens in one batch, padding included; a batch is at least one text, whatever the budget.
        progress: as in `extract`.

    Returns:
        key → (texts, D) float32, in the order of the texts.

    Raises:
        TypeError: no model, no list of texts, no keys; the refusal names the text.
        UnknownKey: a key names no place.
        ValueError: there is no text or no key, or nothing to read in a text.
    """
    check_model(model)
    check_read(read)
    check_switch("chat", chat)
    check_progress(progress)
    check_budget(batch_tokens)
    sites = model._sites.expand(_keys(keys))
    given = encode_texts(model, texts, "texts=", chat=chat)
    bos = bos_of(model)
    weights = [reading(read, text, bos) for text in given]
    reader = Reader(model, sites)
    parts: list[list[mx.array]] = []
    order: list[int] = []
    with reporting(progress, "reading") as step:
        for rows in single_batches([len(text.tokens) for text in given], batch_tokens):
            parts.append(reader.each(given, weights, Batch(rows))[0])
            mx.eval(parts[-1])
            order += rows
            step(len(order), len(given))
    back = mx.array(np.argsort(order))
    whole = [mx.concatenate(list(rows))[back] for rows in zip(*parts, strict=True)]
    mx.eval(whole)
    return {site.key: rows for site, rows in zip(reader.sites, whole, strict=True)}


def mean_activations(
    model: InterpretableModel,
    prompts: Sequence[Any],
    keys: str | Sequence[str],
    *,
    at: At = "all",
    skip_bos: bool = True,
    batch_tokens: int = 4096,
) -> dict[str, mx.array]:
    """The mean activation over the tokens of many prompts: what `interventions.mean_replace` puts in place.

    Args:
        model: the model.
        prompts: texts, lists of token ids, or chats.
        keys: keys, globs or ranges.
        at: which tokens of each prompt count; padding never does.
        skip_bos: leave the beginning-of-sequence token out, whose activation is unlike all others.
        batch_tokens: the most tokens in one batch, padding included; a batch is at least one prompt, whatever the
            budget.

    Returns:
        key → mean, (D,) float32; a glob or range gives one for each place, under its canonical key.

    Raises:
        TypeError: no model, no list of prompts, no keys.
        UnknownKey: a key names no place.
        ValueError: there is no prompt or no key, or no token to average.
    """
    check_model(model)
    check_switch("skip_bos", skip_bos)
    check_budget(batch_tokens)
    if isinstance(prompts, (str, Mapping)):
        raise TypeError(f"prompts are a list of texts, not one {type(prompts).__name__}: one text is [text].")
    if not isinstance(prompts, Iterable):
        raise TypeError(f"prompts are a list of texts, not {prompts!r:.80}.")
    if not isinstance(prompts, mx.array):
        prompts = list(prompts)
    if len(prompts) == 0:
        raise ValueError("there are no texts: give at least one.")
    wanted: dict[str, Site] = {}
    for key in _keys(keys):
        try:
            wanted[key] = model._sites.resolve(key)
        except UnknownKey:  # a glob or a range, or nothing at all, which expand refuses
            wanted |= {site.key: site for site in model._sites.expand(key)}
    sites = list(dict.fromkeys(wanted.values()))
    tokens, _ = model._encode_many(prompts)
    position = Position.of(at)
    sums: dict[Site, mx.array] = {site: mx.array(0.0) for site in sites}
    count = 0
    bos = bos_of(model)
    for batch in single_batches([len(t) for t in tokens], batch_tokens):
        rows = [tokens[i] for i in batch]
        with model.trace(rows) as trace:
            marks = [trace.marks(row, position) for row in range(len(rows))]
            for row, mark in zip(rows, marks, strict=True):
                mark[0] &= not (skip_bos and row[0] == bos)
            weight = mx.array([mark.tolist() for mark in marks]).astype(mx.float32)
            count += int(sum(mark.sum() for mark in marks))
            for site in sites:
                value = trace.read(site).save().astype(mx.float32)
                sums[site] = sums[site] + mx.tensordot(weight, value, axes=[[0, 1], [0, 1]])
        mx.eval(list(sums.values()))
    if not count:
        bos_hint = "; BOS is left out, and skip_bos=False counts it" if skip_bos and bos is not None else ""
        raise ValueError(f"at={at!r} chooses no token of these prompts: there is nothing to average{bos_hint}.")
    return {key: sums[site] / count for key, site in wanted.items()}
