"""What generated text looks like, from its tokens alone: variety, loops, length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TextStatistics:
    """Means over texts. All depend on how long a text is, so compare texts generated to one length.

    Attributes:
        distinct_1: unique tokens / tokens (Li et al. 2016, arXiv 1510.03055).
        distinct_2: unique pairs of neighbours / pairs of neighbours.
        longest_repeat: number of tokens in the longest stretch that occurs twice, overlaps allowed: 4 in
            ``[7, 1, 2, 1, 2, 1, 2]``, where ``[1, 2, 1, 2]`` begins at the second token and again at the fourth. A loop
            of p tokens that fills n has n − p, a passage said twice has its length, plain text a few.
        entropy: of the distribution of tokens within a text, in nats: ``−Σ_t p_t log p_t``.
        length: number of tokens.
    """

    distinct_1: float
    distinct_2: float
    longest_repeat: float
    entropy: float
    length: float


def text_statistics(tokens_of_texts: Sequence[Sequence[int]]) -> TextStatistics:
    """Statistics of generated texts, each for itself, then the mean.

    An empty text counts with 0 in `length` and `longest_repeat`, and not in the other means: it has no tokens to be
    varied. Nor does a text of one token count in `distinct_2`. A mean over no text is NaN.

    Args:
        tokens_of_texts: the token ids of each text, without what was prompt.

    Raises:
        TypeError: they aren't lists of token ids.
        ValueError: there are no texts.
    """
    if isinstance(tokens_of_texts, (str, bytes)):
        raise TypeError("text_statistics takes a list of lists of token ids, not a text: encode it first.")
    texts = [_tokens(tokens) for tokens in tokens_of_texts]
    if not texts:
        raise ValueError("text_statistics takes several texts' tokens, and there are no texts.")
    return TextStatistics(
        distinct_1=_mean([_distinct(text, 1) for text in texts if len(text)]),
        distinct_2=_mean([_distinct(text, 2) for text in texts if len(text) > 1]),
        longest_repeat=_mean([_longest_repeat(text) for text in texts]),
        entropy=_mean([_entropy(text) for text in texts if len(text)]),
        length=_mean([len(text) for text in texts]),
    )


def _tokens(tokens: Any) -> np.ndarray[Any, Any]:
    """(n,) int64.

    Raises:
        TypeError: no token ids.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise TypeError(f"a text is a list of token ids here, not {tokens!r:.60}.")
    return ids.astype(np.int64)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _distinct(tokens: np.ndarray[Any, Any], n: int) -> float:
    grams = np.lib.stride_tricks.sliding_window_view(tokens, n)
    return len(np.unique(grams, axis=0)) / len(grams)


def _longest_repeat(tokens: np.ndarray[Any, Any]) -> int:
    """The longest run of equal tokens between the text and itself moved by any number of tokens."""
    longest = 0
    for lag in range(1, len(tokens)):
        if len(tokens) - lag <= longest:
            break  # what is left is too short
        differ = np.flatnonzero(tokens[lag:] != tokens[:-lag])
        longest = max(longest, int(np.diff(differ, prepend=-1, append=len(tokens) - lag).max()) - 1)
    return longest


def _entropy(tokens: np.ndarray[Any, Any]) -> float:
    _, counts = np.unique(tokens, return_counts=True)
    shares = counts / counts.sum()
    return float(-np.sum(shares * np.log(shares)))
