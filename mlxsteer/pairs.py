"""Contrast pairs: one prompt, a completion that shows a behaviour and one that doesn't."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SPLITS = ("train", "choose", "report")
"""Vectors are computed on train, layers and strengths picked on choose, numbers reported on report."""


@dataclass(frozen=True)
class ContrastPair:
    """Two completions of one prompt that differ in one behaviour.

    The texts are joined as they stand: a completion that goes on after a word begins with a space.

    Attributes:
        prompt: what both begin with, such as ``"The soup was"``.
        positive: the completion that shows the behaviour, such as ``" delicious."``.
        negative: the completion that shows its opposite, such as ``" awful."``.
        split: ``"train"``, ``"choose"`` or ``"report"``, or None where there are no splits.
        chat: the prompt is a user's message, and the completions are the answers of a chat model. With an empty prompt
            the completions are two messages of a user, and what they differ in is read before any answer.
        messages: a whole conversation in place of the prompt, as dicts with `role` and `content`.
    """

    prompt: str = ""
    positive: str = ""
    negative: str = ""
    split: str | None = None
    chat: bool = False
    messages: tuple[dict[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt", "positive", "negative"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"a contrast pair's {name} is a text, not {type(getattr(self, name)).__name__}.")
        object.__setattr__(self, "messages", tuple(self.messages))
        if self.messages and self.prompt:
            raise ValueError("a contrast pair has a prompt or messages, not both.")
        if not self.prompt + self.positive or not self.prompt + self.negative:
            raise ValueError("a contrast pair with an empty side has nothing to read.")
        if self.positive == self.negative:
            raise ValueError(f"both sides of a contrast pair are {self.positive!r}: there is no contrast.")
        if (self.chat or self.messages) and not (self.positive and self.negative):
            raise ValueError("a contrast pair of a chat has two answers (or two messages), and one is empty.")
        if self.split is not None and self.split not in SPLITS:
            raise ValueError(f"a split is one of {', '.join(SPLITS)}, not {self.split!r}.")


def checked(pairs: Iterable[ContrastPair]) -> list[ContrastPair]:
    """The pairs as a list.

    Raises:
        TypeError: they aren't contrast pairs.
        ValueError: there are none.
    """
    if isinstance(pairs, str):
        raise TypeError(f"contrast pairs are a list of ContrastPair; a shipped set is datasets.load({pairs!r}).")
    chosen = list(pairs)
    for pair in chosen:
        if not isinstance(pair, ContrastPair):
            raise TypeError(f"contrast pairs are a list of ContrastPair(prompt, positive, negative), not {pair!r}.")
    if not chosen:
        raise ValueError("there are no contrast pairs: give at least one contrast pair.")
    return chosen


def in_split(pairs: Sequence[ContrastPair], split: str) -> list[ContrastPair]:
    """The pairs of one split; all of them where no pair names a split.

    Raises:
        ValueError: there are splits, and this one is empty.
    """
    if all(pair.split is None for pair in pairs):
        return list(pairs)
    chosen = [pair for pair in pairs if pair.split == split]
    if not chosen:
        raise ValueError(f"no pair is in the split {split!r}; there are {sorted({p.split or 'none' for p in pairs})}.")
    return chosen
