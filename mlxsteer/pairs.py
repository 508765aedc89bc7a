"""Contrast pairs, alone and in sets: one prompt, a completion that shows a behaviour and one that doesn't."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

if TYPE_CHECKING:
    from mlxsteer.pair_checks import Check

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
            said = self.positive if len(self.positive) <= 60 else self.positive[:57] + "..."
            raise ValueError(f"both sides of a contrast pair are {said!r}: there is no contrast.")
        if (self.chat or self.messages) and not (self.positive and self.negative):
            raise ValueError("a contrast pair of a chat has two answers (or two messages), and one is empty.")
        if self.split is not None and self.split not in SPLITS:
            raise ValueError(f"a split is one of {', '.join(SPLITS)}, not {self.split!r}.")


def context(pair: ContrastPair) -> str:
    """What both sides of a pair begin with, as one text: its prompt, or its messages; empty where it has neither."""
    return pair.prompt or "\n".join(f"{m['role']}: {m['content']}" for m in pair.messages)


def side_texts(pair: ContrastPair) -> tuple[str, str]:
    """The whole positive and the whole negative text of a pair; an answer of a chat has a line of its own."""
    before = context(pair)
    if before and (pair.chat or pair.messages):
        before += "\n"
    return before + pair.positive, before + pair.negative


def folded(text: str) -> str:
    """A text without its case and its spacing, to find copies."""
    return " ".join(text.casefold().split())


def counted(number: int, noun: str) -> str:
    """A number of things in words, such as ``"1 pair"`` and ``"2 pairs"``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _all_pairs(pairs: Iterable[ContrastPair]) -> list[ContrastPair]:
    if isinstance(pairs, str):
        raise TypeError(f"contrast pairs are a list of ContrastPair; a shipped set is datasets.load({pairs!r}).")
    chosen = list(pairs)
    for pair in chosen:
        if not isinstance(pair, ContrastPair):
            raise TypeError(f"contrast pairs are a list of ContrastPair(prompt, positive, negative), not {pair!r}.")
    return chosen


def checked(pairs: Iterable[ContrastPair]) -> list[ContrastPair]:
    """The pairs as a list.

    Raises:
        TypeError: they aren't contrast pairs.
        ValueError: there are none.
    """
    chosen = _all_pairs(pairs)
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


class PairSet(list[ContrastPair]):
    """A list of contrast pairs with a name.

    Args:
        pairs: the pairs; there may be none.
        name: what to call the set in reports.

    Raises:
        TypeError: they aren't contrast pairs, or the name is no text.
    """

    name: str

    def __init__(self, pairs: Iterable[ContrastPair] = (), *, name: str = "") -> None:
        if not isinstance(name, str):
            raise TypeError(f"the name of a pair set is a text, not {type(name).__name__}.")
        super().__init__(_all_pairs(pairs))
        self.name = name

    @overload
    def __getitem__(self, index: SupportsIndex) -> ContrastPair: ...
    @overload
    def __getitem__(self, index: slice) -> PairSet: ...
    def __getitem__(self, index: SupportsIndex | slice) -> ContrastPair | PairSet:
        if isinstance(index, slice):
            return PairSet(super().__getitem__(index), name=self.name)
        return super().__getitem__(index)

    def __repr__(self) -> str:
        name = f"{self.name!r}, " if self.name else ""
        splits = ", ".join(f"{count} {split}" for split, count in self.splits.items())
        return f"PairSet({name}{counted(len(self), 'pair')}{': ' + splits if splits else ''})"

    @property
    def splits(self) -> dict[str, int]:
        """How many pairs each split has, as split → count; splits without a pair, and pairs without a split, are left
        out."""
        counts = {split: sum(pair.split == split for pair in self) for split in SPLITS}
        return {split: count for split, count in counts.items() if count}

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of what the pairs say, whatever their order, their splits and the name
        of the set."""
        rows = sorted(json.dumps([p.prompt, p.positive, p.negative, p.chat, p.messages], sort_keys=True) for p in self)
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]

    def split(self, name: str) -> PairSet:
        """The pairs of one split; all of them where no pair names a split.

        Args:
            name: ``"train"``, ``"choose"`` or ``"report"``.

        Raises:
            ValueError: there is no such split, or there are splits and this one is empty.
        """
        if name not in SPLITS:
            raise ValueError(f"a split is one of {', '.join(SPLITS)}, not {name!r}.")
        return PairSet(in_split(self, name), name=self.name)

    def with_splits(self, train: float = 0.5, choose: float = 0.2, report: float = 0.3, seed: int = 0) -> PairSet:
        """The same pairs in the same order, put into splits by chance; splits they had are forgotten.

        Pairs that share a prompt, or a whole text, stay in one split (case and spacing don't count), so the shares are
        met as nearly as such groups allow.

        Args:
            train: share of the pairs to compute vectors on.
            choose: share of the pairs to pick layers and strengths on.
            report: share of the pairs to report numbers on.
            seed: the same seed gives the same splits.

        Returns:
            A new set; this one is left as it is.

        Raises:
            ValueError: a share is negative, they don't sum to 1, or a split whose share isn't 0 would be empty.
        """
        shares = dict(zip(SPLITS, (train, choose, report), strict=True))
        if not all(share >= 0 for share in shares.values()) or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
            given = ", ".join(f"{split}={share}" for split, share in shares.items())
            raise ValueError(f"the shares of the splits are at least 0 and sum to 1, not {given}.")
        groups = _groups(self)
        random.Random(seed).shuffle(groups)
        groups.sort(key=len, reverse=True)  # large groups first: small ones even out what they leave
        missing = {split: share * len(self) for split, share in shares.items() if share}
        split_of: dict[int, str] = {}
        for group in groups:
            split = max(missing, key=missing.__getitem__)
            missing[split] -= len(group)
            split_of |= dict.fromkeys(group, split)
        empty = [split for split in missing if split not in split_of.values()]
        if empty:
            raise ValueError(
                f"no pair is left for the split {empty[0]!r}: {counted(len(self), 'pair')} in "
                f"{counted(len(groups), 'group')} that share a prompt or a text, and a group stays in one split."
            )
        return PairSet([replace(pair, split=split_of[row]) for row, pair in enumerate(self)], name=self.name)

    def shuffled(self, seed: int = 0) -> PairSet:
        """The same pairs in another order.

        Args:
            seed: the same seed gives the same order.
        """
        return PairSet(random.Random(seed).sample(self, len(self)), name=self.name)

    def check(self, tokenizer: Any = None) -> Check:
        """Whether these are good contrast pairs: what is well, what to look at, what is wrong, in words.

        Args:
            tokenizer: measures lengths in tokens, by its `encode`; in characters without one.

        Returns:
            A `Check`; print it, or ask for its `ok`, `warnings` and `errors`.

        Raises:
            TypeError: the tokenizer has no `encode`.
        """
        from mlxsteer.pair_checks import check_pairs

        return check_pairs(self, tokenizer)


def _groups(pairs: Sequence[ContrastPair]) -> list[list[int]]:
    """The rows of the pairs, those together that share a prompt or a whole text."""
    leader = list(range(len(pairs)))

    def lead(row: int) -> int:
        while leader[row] != row:
            leader[row] = row = leader[leader[row]]
        return row

    first: dict[tuple[str, str], int] = {}
    for row, pair in enumerate(pairs):
        keys = [("text", folded(text)) for text in side_texts(pair)]
        if context(pair):
            keys.append(("prompt", folded(context(pair))))
        for key in keys:
            leader[lead(row)] = lead(first.setdefault(key, row))
    groups: dict[int, list[int]] = {}
    for row in range(len(pairs)):
        groups.setdefault(lead(row), []).append(row)
    return list(groups.values())
