"""What a steering is meant to do, from log-probabilities alone: which of two completions the model prefers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer.continuation import Score, check_touched, first_edited, passes_over, shares
from mlxsteer.interventions.base import Intervention
from mlxsteer.measures.divergence import doses, edits_of, outside_blocks, positions_of, several_positions
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import ContrastPair, checked
from mlxsteer.questions import check_count, groups, of_pairs
from mlxsteer.reading import as_chat
from mlxsteer.sites import Site


class Preferences:
    """``log P(positive | prompt) − log P(negative | prompt)`` in nats of many pairs, under one steering after another.

    The clean pass over the pairs runs once, and so do the tokens before the first one that is steered.

    Args:
        model: the model.
        pairs: contrast pairs; all of them, whatever their split.
        at: which tokens will be steered: one choice or several.
        normalize: ``"token"`` divides each completion's log-probability by its number of tokens.
        chat: prompts are a user's messages.
        plain: run the whole model for every steering, for places before the blocks or behind them.
        variants: how many steerings will be run at once; see `dose`.
        batch_tokens: the most tokens in one batch, padding and variants included.

    Raises:
        ValueError: there are no pairs, or their sides are prompts without completions; another `normalize`.
    """

    def __init__(
        self,
        model: InterpretableModel,
        pairs: Iterable[ContrastPair],
        *,
        at: Any = "all",
        normalize: str | None = None,
        chat: bool = False,
        plain: bool = False,
        variants: int = 1,
        batch_tokens: int = 4096,
    ) -> None:
        if normalize not in (None, "token"):
            raise ValueError(f"normalize is 'token' or None, not {normalize!r}.")
        self.model, self.plain = model, plain
        positions = several_positions(at)
        check_count(batch_tokens, "batch_tokens", 1)
        chosen = [as_chat(pair) if chat else pair for pair in checked(pairs)]
        question = of_pairs(model, chosen, normalize)
        half = len(chosen)
        alone = not model._sites.family.batch
        texts_and_needs = list(zip(question.texts, question.needed, strict=True))
        check_touched(model, texts_and_needs, positions, at)
        shared = shares(model, plain=plain)
        firsts = [first_edited(model, *one, positions) if shared else 0 for one in texts_and_needs]
        self.count, self.question = half, question
        self._passes = [
            each
            for group in groups(question, firsts, variants, batch_tokens, alone=alone)
            for each in passes_over(model, question, [*group, *(i + half for i in group)], positions, plain=plain)
        ]
        self._counts = [len(positions) for positions in question.needed]
        self.base = self._collected(None, [1.0])[0]

    def shortened(self, tokens: int) -> Preferences:
        """The same pairs, by the first tokens of each completion alone: cheaper, and of every pair."""
        short = copy.copy(self)
        short._passes, short._counts = [], [min(tokens, count) for count in self._counts]
        for one, rows, score in self._passes:
            cut, kept = one.shortened([self.question.needed[i].start + short._counts[i] for i in rows])
            short._passes.append((cut, rows, functools.partial(_of_some, score, kept)))
        short.base = short._collected(None, [1.0])[0]
        return short

    @property
    def block_tokens(self) -> int:
        """Tokens times blocks that ran so far."""
        return sum(one.block_tokens for one, *_ in self._passes)

    def under(self, edits: Sequence[tuple[Site, Intervention]]) -> np.ndarray[Any, Any]:
        """The preferences under some edits, (pairs,)."""
        return self._collected(lambda _: edits, [1.0])[0]

    def dose(
        self, make: Callable[[list[float]], Sequence[tuple[Site, Intervention]]], strengths: Sequence[float]
    ) -> np.ndarray[Any, Any]:
        """The preferences at several strengths, which are rows of one batch, (strengths, pairs).

        Args:
            make: a strength for each row → edits.
            strengths: the strengths.
        """
        return self._collected(make, strengths)

    def shift(self, interventions: Mapping[str, Any], strength: float = 1.0) -> np.ndarray[Any, Any]:
        """How far a key dict moves each pair's preference, all its strengths multiplied by `strength`, (pairs,)."""
        shift: np.ndarray[Any, Any] = self.under(edits_of(self.model, interventions, strength)) - self.base
        return shift

    def _collected(
        self, make: Callable[[list[float]], Sequence[tuple[Site, Intervention]]] | None, strengths: Sequence[float]
    ) -> np.ndarray[Any, Any]:
        sums = np.zeros((len(strengths), 2 * self.count))
        for one, rows, score in self._passes:
            scores = one.clean(score)[None] if make is None else doses(self.model, one, make, strengths, score)
            ends = np.cumsum([self._counts[i] for i in rows])[:-1]
            for i, part in zip(rows, np.split(scores, ends, axis=1), strict=True):
                sums[:, i] = part.sum(axis=1)
        effect: np.ndarray[Any, Any] = sums[:, : self.count] - sums[:, self.count :]
        return effect


def _of_some(score: Score, kept: np.ndarray[Any, Any], logits: mx.array, positions: np.ndarray[Any, Any]) -> mx.array:
    """Scores of a pass of which only some needed positions are left."""
    return score(logits, kept[positions])


def preference_shift(
    model: InterpretableModel,
    interventions: Mapping[str, Any],
    pairs: Iterable[ContrastPair],
    *,
    normalize: str | None = None,
    chat: bool = False,
    batch_tokens: int = 4096,
) -> np.ndarray[Any, Any]:
    """How far a steering moves ``log P(positive) − log P(negative)`` of each pair, in nats, (pairs,).

    Args:
        model: the model.
        interventions: a key dict.
        pairs: contrast pairs; all of them, whatever their split.
        normalize: ``"token"`` divides each completion's log-probability by its number of tokens.
        chat: prompts are a user's messages.
        batch_tokens: the most tokens in one batch, padding included.

    Raises:
        ValueError: there are no pairs, or their sides are prompts without completions.
        UnknownKey: a key names no place.
    """
    edits = edits_of(model, interventions)
    preferences = Preferences(
        model, pairs, at=positions_of(edits), normalize=normalize, chat=chat, plain=outside_blocks(edits),
        batch_tokens=batch_tokens,
    )  # fmt: skip
    moved: np.ndarray[Any, Any] = preferences.under(edits) - preferences.base
    return moved
