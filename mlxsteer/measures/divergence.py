"""What a steering does beside what it is meant to do: divergence from the base model, and how probable its text is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxsteer.continuation import Continuation, Score, check_touched, first_edited, shares
from mlxsteer.interventions.base import Compose, Intervention
from mlxsteer.interventions.gates import looks_back
from mlxsteer.model import InterpretableModel
from mlxsteer.positions import Position
from mlxsteer.questions import check_count
from mlxsteer.reading import Text, encode_text, single_batches
from mlxsteer.sites import Site
from mlxsteer.steering import Steering


@dataclass(frozen=True)
class Divergence:
    """``KL(base ‖ steered)`` of the next-token distributions in nats, over tokens.

    Attributes:
        mean: mean over tokens.
        p50: median.
        p95: 95th percentile.
        largest: maximum.
        tokens: number of tokens.
    """

    mean: float
    p50: float
    p95: float
    largest: float
    tokens: int

    @classmethod
    def of(cls, per_token: np.ndarray[Any, Any]) -> Divergence:
        """The summary of one value per token."""
        values = np.asarray(per_token, np.float64).reshape(-1)
        p50, p95 = np.percentile(values, [50, 95])
        return cls(float(values.mean()), float(p50), float(p95), float(values.max()), len(values))

    def __str__(self) -> str:
        return f"KL {self.mean:.3g} nats a token on average (median {self.p50:.3g}, 95th percentile {self.p95:.3g})"


class Reference:
    """Texts that steering is held against: neutral prompts, each continued by the unsteered model itself.

    The clean pass over them runs once, so that many steerings can be measured against it.

    Args:
        model: the model.
        prompts: texts, lists of token ids, or chats.
        tokens: how many tokens the unsteered model adds to each, greedily; they are what is measured. 0 measures the
            tokens of the prompts themselves, but the first.
        at: which tokens will be steered: one choice or several. An int or a slice counts in the prompt.
        chat: texts are a user's messages.
        plain: run the whole model for every steering, for places before the blocks or behind them.
        variants: how many steerings will be run at once; see `dose`.
        batch_tokens: the most tokens in one batch, padding and variants included.

    Raises:
        ValueError: there are no prompts, or nothing in them to measure.
    """

    def __init__(
        self,
        model: InterpretableModel,
        prompts: Iterable[Any],
        *,
        tokens: int = 24,
        at: Any = "all",
        chat: bool = False,
        plain: bool = False,
        variants: int = 1,
        batch_tokens: int = 4096,
    ) -> None:
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
            raise ValueError(f"tokens is how many tokens to add, 0 or more, not {tokens!r}.")
        check_count(batch_tokens, "batch_tokens", 1)
        self.model, self.plain = model, plain
        positions = several_positions(at)
        self.texts = continued(model, prompts, tokens, chat=chat)
        batches = _batches(model, self.texts, positions, batch_tokens // variants, whole=not tokens, plain=plain)
        self.passes = [Continuation(model, some, needed, positions, plain=plain) for some, needed in batches]
        whole = [(text, range(len(text.tokens) - 1)) for text in self.texts if len(text.tokens) > 1]
        if whole:
            check_touched(model, whole, positions, at)
        if not self.passes:
            raise ValueError("prompts of one token each hold no token to measure: ask for some with tokens=.")

    def shortened(self, tokens: int) -> Reference:
        """The same texts, with only the first tokens of each continuation measured: cheaper, and of every prompt."""
        short = copy.copy(self)
        short.texts = [Text(text.tokens[: text.prompt + tokens], text.prompt) for text in self.texts]
        short.passes = [
            one.shortened([min(len(row), (prompt.length or 0) + tokens - 1)
                           for row, prompt in zip(one.rows, one.prompts, strict=True)])[0]
            for one in self.passes
        ]  # fmt: skip
        return short

    @property
    def block_tokens(self) -> int:
        """Tokens times blocks that ran so far."""
        return sum(one.block_tokens for one in self.passes)

    def per_token(self, edits: Sequence[tuple[Site, Intervention]]) -> np.ndarray[Any, Any]:
        """KL(base ‖ steered) at every token measured, (tokens,)."""
        return np.concatenate([one.divergences(edits, 1)[0] for one in self.passes])

    def dose(
        self, make: Callable[[list[float]], Sequence[tuple[Site, Intervention]]], strengths: Sequence[float]
    ) -> np.ndarray[Any, Any]:
        """KL(base ‖ steered) at several strengths, which are rows of one batch, (strengths, tokens).

        Args:
            make: a strength for each row → edits.
            strengths: the strengths.
        """
        return np.concatenate([doses(self.model, one, make, strengths, None) for one in self.passes], axis=1)

    def divergence(self, interventions: Mapping[str, Any], strength: float = 1.0) -> Divergence:
        """The divergence of a key dict, all its strengths multiplied by `strength`."""
        return Divergence.of(self.per_token(edits_of(self.model, interventions, strength)))


def doses(
    model: InterpretableModel,
    one: Continuation,
    make: Callable[[list[float]], Sequence[tuple[Site, Intervention]]],
    strengths: Sequence[float],
    score: Score | None,
) -> np.ndarray[Any, Any]:
    """Scores of a pass (or its divergences, without a score) at several strengths, (strengths, needed positions)."""
    rows = len(one.rows)
    # A family whose rows differ in a batch takes one strength at a time.
    pieces = [list(strengths)] if model._sites.family.batch else [[strength] for strength in strengths]
    found = []
    for some in pieces:
        edits = make([strength for strength in some for _ in range(rows)])
        found.append(one.divergences(edits, len(some)) if score is None else one.edited(edits, len(some), score))
    return np.concatenate(found)


def edits_of(
    model: InterpretableModel, interventions: Mapping[str, Any], strength: float = 1.0
) -> list[tuple[Site, Intervention]]:
    """A key dict as (site, intervention), all strengths multiplied by `strength`."""
    edits = Steering.of(model._sites, interventions).edits
    for site, edit in edits:
        if any(part.strengths is not None for part in edit.parts()):
            raise ValueError(f"{site.key}: measures take one strength for all texts, not one per row of a batch.")
    return [(site, edit if strength == 1.0 else Compose((edit,), strength)) for site, edit in edits]


def several_positions(at: Any) -> list[Position]:
    """One choice of tokens as written, or several that are positions already, as a list of positions."""
    return list(at) if isinstance(at, list) and at and isinstance(at[0], Position) else [Position.of(at)]


def positions_of(edits: Iterable[tuple[Site, Intervention]]) -> list[Position]:
    """Every choice of tokens that some edits have; all tokens, where one of them must see what it doesn't edit."""
    edits = list(edits)
    if any(looks_back(edit) for _, edit in edits):
        return [Position.of("all")]
    return list(dict.fromkeys(part.at for _, edit in edits for part in edit.parts()))


def outside_blocks(edits: Iterable[tuple[Site, Intervention]]) -> bool:
    """Whether some edit lies before the blocks or behind them."""
    return any(site.layer is None for site, _ in edits)


def listed(prompts: Iterable[Any]) -> list[Any]:
    """Neutral prompts as a list.

    Raises:
        TypeError: one prompt in place of a list.
    """
    if isinstance(prompts, (str, Mapping)):
        raise TypeError("neutral prompts are a list; one prompt is [prompt].")
    return list(prompts)


def continued(model: InterpretableModel, prompts: Iterable[Any], tokens: int, *, chat: bool = False) -> list[Text]:
    """Prompts with what the unsteered model says next, greedily.

    Raises:
        TypeError: one prompt in place of a list.
        ValueError: there are none, or the model ends every one of them at once.
    """
    texts = [encode_text(model, prompt, chat=chat) for prompt in listed(prompts)]
    if not texts:
        raise ValueError("there are no neutral prompts: give at least one.")
    if not tokens:
        return texts
    made = model.generate([text.tokens for text in texts], max_tokens=tokens)
    whole = [Text([*text.tokens, *one.tokens], len(text.tokens)) for text, one in zip(texts, made, strict=True)]
    found = [text for text in whole if len(text.tokens) > text.prompt]
    if not found:
        raise ValueError("the model says nothing to any of these prompts: there is nothing to measure.")
    return found


def _batches(
    model: InterpretableModel, texts: Sequence[Text], positions: Sequence[Position], budget: int, *,
    whole: bool, plain: bool,
) -> Iterator[tuple[list[Text], list[range]]]:  # fmt: skip
    """Texts of similar length, with the positions whose logits predict what is measured.

    A batch runs clean up to the first edited token of any of its texts: those whose own are far apart are kept apart.
    """
    every = [(text, range(0 if whole else text.prompt - 1, len(text.tokens) - 1)) for text in texts]
    kept = [(text, needed) for text, needed in every if len(needed)]
    shared = shares(model, plain=plain)
    firsts = [first_edited(model, *one, positions) if shared else 0 for one in kept]
    clusters: list[list[int]] = []
    for i in sorted(range(len(kept)), key=lambda i: firsts[i]):
        run = kept[i][1].stop - firsts[i]
        if not clusters or firsts[i] - firsts[clusters[-1][0]] > max(1, run // 4):
            clusters.append([])
        clusters[-1].append(i)
    for cluster in clusters:
        lengths = [len(kept[i][0].tokens) for i in cluster]
        for batch in single_batches(lengths, budget if model._sites.family.batch else 1):
            rows = [kept[cluster[i]] for i in batch]
            yield [text for text, _ in rows], [needed for _, needed in rows]


def kl(
    model: InterpretableModel,
    interventions: Mapping[str, Any],
    prompts: Iterable[Any],
    *,
    tokens: int = 24,
    chat: bool = False,
    batch_tokens: int = 4096,
) -> Divergence:
    """How far a steering moves a model's predictions: ``KL(base ‖ steered)`` per token, in nats.

    As Arditi et al. 2024 (arXiv 2406.11717) measure it on harmless prompts, but over the tokens of the unsteered
    model's own continuations, teacher-forced.

    Args:
        model: the model.
        interventions: a key dict.
        prompts: neutral ones; texts, token ids or chats.
        tokens: how many tokens of continuation; 0 measures the tokens of the prompts themselves.
        chat: texts are a user's messages.
        batch_tokens: the most tokens in one batch, padding included.

    Raises:
        ValueError: there are no prompts.
        UnknownKey: a key names no place.
    """
    edits = edits_of(model, interventions)
    reference = Reference(
        model, prompts, tokens=tokens, at=positions_of(edits), chat=chat, plain=outside_blocks(edits),
        batch_tokens=batch_tokens,
    )  # fmt: skip
    return Divergence.of(reference.per_token(edits))


def log_likelihood(model: InterpretableModel, texts: Sequence[Text], batch_tokens: int = 4096) -> list[float]:
    """Log-probability in nats of each text's completion under the unsteered model; 0 for one without a completion."""
    import mlx.core as mx

    found = dict.fromkeys(range(len(texts)), 0.0)
    some = [i for i, text in enumerate(texts) if len(text.tokens) > text.prompt]
    for batch in single_batches([len(texts[i].tokens) for i in some], batch_tokens if model._sites.family.batch else 1):
        rows = [texts[some[i]] for i in batch]
        needed = [range(row.prompt - 1, len(row.tokens) - 1) for row in rows]
        targets = np.array([row.tokens[p + 1] for row, positions in zip(rows, needed, strict=True) for p in positions])

        def score(logits: mx.array, numbers: Any, targets: Any = targets) -> mx.array:
            chosen = mx.take_along_axis(logits, mx.array(targets[numbers])[:, None], axis=-1)[:, 0]
            return chosen - mx.logsumexp(logits, axis=-1)

        scores = Continuation(model, rows, needed, Position.of("all")).clean(score)
        ends = np.cumsum([len(positions) for positions in needed])[:-1]
        for i, part in zip(batch, np.split(scores, ends), strict=True):
            found[some[i]] = float(part.sum())
    return list(found.values())


def perplexity(model: InterpretableModel, generations: Sequence[Any], batch_tokens: int = 4096) -> float:
    """Perplexity of generated texts under the unsteered model: ``exp(−mean log P(token))`` over all their tokens.

    Args:
        model: the model that judges, without steering.
        generations: what `generate` gave; their prompts count as given.
        batch_tokens: the most tokens in one batch, padding included.

    Raises:
        ValueError: none of them has a token.
    """
    texts = [Text([*one.prompt_tokens, *one.tokens], len(one.prompt_tokens)) for one in generations]
    count = sum(len(text.tokens) - text.prompt for text in texts)
    if not count:
        raise ValueError("these generations are all empty: there is nothing to judge.")
    return float(np.exp(-sum(log_likelihood(model, texts, batch_tokens)) / count))
