"""Contrast pairs, alone and in sets: one prompt, a completion that shows a behaviour and one that doesn't."""

from __future__ import annotations

import difflib
import hashlib
import json
import numbers
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

if TYPE_CHECKING:
    from mlxsteer.pair_checks import Check

SPLITS = ("train", "choose", "report")
"""Vectors are computed on train, layers and strengths picked on choose, numbers reported on report."""

PAIR_HASHES = "pair_hashes"
"""What a vector's `info` calls the hashes of the pairs that it was computed from, as one text."""

MOST_HASHES = 2000
"""Of more pairs no hashes are kept, so that a vector's file stays small."""

_SHARES = {"train": 0.5, "choose": 0.2, "report": 0.3}
_FEW = 10
"""So many names are listed where none is near; of more, what lists them is named."""


def nearest(name: object, known: Iterable[str], listing: str = "") -> str:
    """How a refusal of a name ends: with the nearest of those there are, or with all where none is near.

    Args:
        name: what was given.
        known: the names there are.
        listing: what lists them, such as ``"available()"``, where they may be too many for a sentence.
    """
    names = list(known)
    word = str(name).casefold()
    near = difflib.get_close_matches(word, names, n=3) or [known for known in names if len(word) > 2 and word in known]
    if near:
        return f"Nearest: {', '.join(near)}."
    return f"There are {', '.join(names)}." if len(names) <= _FEW else f"{listing} lists the {len(names)} there are."


def hint(name: object, known: Iterable[str]) -> str:
    """The nearest of a few names that a refusal has listed already, as its last sentence; empty where none is near."""
    near = difflib.get_close_matches(name.casefold(), list(known), n=1) if isinstance(name, str) else []
    return f" Nearest: {near[0]}." if near else ""


def check_switch(name: str, value: Any) -> None:
    """Refuse anything but True and False.

    Raises:
        TypeError: it is something else, be it true or false in a condition.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {value!r}.")


def check_seed(seed: Any) -> None:
    """Refuse what is no seed.

    Raises:
        ValueError: it is no whole number from 0 on.
    """
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        raise ValueError(f"a seed is a whole number from 0 on, not {seed!r}.")


def _check_split(name: Any) -> None:
    if name not in SPLITS:
        raise ValueError(f"a split is one of {', '.join(SPLITS)}, not {name!r}.{hint(name, SPLITS)}")


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
        group: which part of a set that holds several behaviours, such as a topic or a task; None where it is one.
    """

    prompt: str = ""
    positive: str = ""
    negative: str = ""
    split: str | None = None
    chat: bool = False
    messages: tuple[dict[str, str], ...] = field(default=(), hash=False)  # dicts have no hash
    group: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "positive", "negative"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"a contrast pair's {name} is a text, not {type(getattr(self, name)).__name__}.")
        check_switch("chat", self.chat)
        if not _is_conversation(self.messages):
            raise TypeError(
                "a contrast pair's messages are a list of dicts with the texts role and content, not "
                f"{self.messages!r:.80}."
            )
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
        if self.split is not None:
            _check_split(self.split)
        if not isinstance(self.group, str | None):
            raise TypeError(f"a contrast pair's group is a text such as 'ocean', not {self.group!r:.80}.")
        if self.group == "":
            raise ValueError("a contrast pair's group is empty: give None where it is in none.")


def _is_conversation(messages: Any) -> bool:
    return isinstance(messages, (list, tuple)) and all(
        isinstance(said, Mapping) and all(isinstance(said.get(name), str) for name in ("role", "content"))
        for said in messages
    )


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


def pair_hash(pair: ContrastPair) -> str:
    """8 hexadecimal digits that tell a pair from others by what it says.

    Whatever its split, its case and spaces, where its prompt ends and which side is the positive one: a vector has seen
    the pair all the same. Two pairs of a set of 2,000 share theirs by chance once in 2,000 such sets.
    """
    texts = sorted("".join(text.casefold().split()) for text in side_texts(pair))
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:8]


def pair_hashes(pairs: Sequence[ContrastPair]) -> dict[str, str]:
    """What a vector's `info` keeps of the pairs that it is computed from, whatever their order; nothing of too many."""
    return {PAIR_HASHES: " ".join(sorted(set(map(pair_hash, pairs))))} if len(pairs) <= MOST_HASHES else {}


def pairs_seen(hashes: Any, pairs: Iterable[ContrastPair]) -> int | None:
    """How many of some pairs a vector was computed from.

    Args:
        hashes: what the vector's `info` keeps as `PAIR_HASHES`.
        pairs: the pairs.

    Returns:
        their number; None where that is unknown, because the vector is an older or a foreign one.
    """
    known = set(hashes.split()) if isinstance(hashes, str) else None
    return None if known is None else sum(pair_hash(pair) in known for pair in pairs)


def shared_by_splits(pairs: Iterable[ContrastPair]) -> tuple[int, int]:
    """Number of pairs that are in another split too, and of others whose prompt is; case and spaces don't count."""
    places: dict[tuple[str, str], set[str]] = {}
    rows = []
    for pair in pairs:
        if pair.split is not None:
            rows.append((("pair", pair_hash(pair)), ("prompt", folded(context(pair)))))
            for key in rows[-1]:
                places.setdefault(key, set()).add(pair.split)
    places["prompt", ""] = set()  # no prompt is none in common
    copies = [len(places[pair]) > 1 for pair, _ in rows]
    beside = [len(places[prompt]) > 1 and not copy for (_, prompt), copy in zip(rows, copies, strict=True)]
    return sum(copies), sum(beside)


def _all_pairs(pairs: Iterable[ContrastPair]) -> list[ContrastPair]:
    if isinstance(pairs, str):
        raise TypeError(f"contrast pairs are a list of ContrastPair; a shipped set is datasets.load({pairs!r}).")
    if isinstance(pairs, ContrastPair):
        raise TypeError("contrast pairs are a list of ContrastPair; one pair is [pair].")
    if not isinstance(pairs, Iterable):
        raise TypeError(f"contrast pairs are a list of ContrastPair(prompt, positive, negative), not {pairs!r:.80}.")
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

    def __add__(self, other: list[ContrastPair]) -> PairSet:  # type: ignore[override]  # pairs and nothing else
        if not isinstance(other, list):
            return NotImplemented
        names = dict.fromkeys([self.name, getattr(other, "name", "")])
        return PairSet([*self, *other], name=" + ".join(filter(None, names)))

    def copy(self) -> PairSet:
        """Another set of the same pairs and name."""
        return PairSet(self, name=self.name)

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
    def groups(self) -> dict[str, int]:
        """How many pairs each group has, as group → count, in order of appearance; empty where no pair names one."""
        return dict(Counter(pair.group for pair in self if pair.group is not None))

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
        _check_split(name)
        return PairSet(in_split(self, name), name=self.name)

    def group(self, name: str) -> PairSet:
        """The pairs of one group, such as those of one topic; the set's name is then ``"topic: ocean"``.

        Raises:
            ValueError: no pair is in such a group.
        """
        chosen = [pair for pair in self if pair.group is not None and pair.group == name]
        if not chosen:
            there = self.groups
            end = nearest(name, there, "groups") if there else "No pair of this set names a group."
            raise ValueError(f"no pair is in the group {name!r}. {end}")
        return PairSet(chosen, name=f"{self.name}: {name}" if self.name else name)

    def with_splits(
        self, train: float | None = None, choose: float | None = None, report: float | None = None, seed: int = 0
    ) -> PairSet:
        """The same pairs in the same order, put into splits by chance; splits they had are forgotten.

        Pairs that share a prompt, or a whole text, stay in one split (case and spacing don't count), so the shares are
        met as nearly as such groups allow. Shares that aren't given divide what is left as 0.5 : 0.2 : 0.3, so that
        ``train=0.8`` leaves 0.08 and 0.12.

        Args:
            train: share of the pairs to compute vectors on.
            choose: share of the pairs to pick layers and strengths on.
            report: share of the pairs to report numbers on.
            seed: the same seed gives the same splits.

        Returns:
            A new set; this one is left as it is.

        Raises:
            ValueError: a share is negative, they don't sum to 1, or a split whose share isn't 0 would be empty; the
                seed is no whole number from 0 on.
        """
        check_seed(seed)
        shares = _shares({"train": train, "choose": choose, "report": report})
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

        Raises:
            ValueError: the seed is no whole number from 0 on.
        """
        check_seed(seed)
        return PairSet(random.Random(seed).sample(self, len(self)), name=self.name)

    def check(self, tokenizer: Any = None) -> Check:
        """Whether these are good contrast pairs: what is well, what to look at, what is wrong, in words.

        Args:
            tokenizer: measures lengths in tokens, by its `encode`; in characters without one. A model's own where an
                `InterpretableModel` is given.

        Returns:
            A `Check`; print it, or ask for its `ok`, `warnings` and `errors`.

        Raises:
            TypeError: the tokenizer has no `encode`, or the model no tokenizer.
        """
        from mlxsteer.pair_checks import check_pairs

        return check_pairs(self, tokenizer)


def _shares(given: Mapping[str, float | None]) -> dict[str, float]:
    """Split → share, of those given and of what they leave."""
    told = {split: share for split, share in given.items() if share is not None}
    sound = all(isinstance(s, numbers.Real) and not isinstance(s, bool) and s >= 0 for s in told.values())
    left = round(1 - sum(told.values()), 6) if sound else 0.0
    if not sound or left < 0 or (left and len(told) == len(SPLITS)):
        said = ", ".join(f"{split}={share!r}" for split, share in told.items())
        raise ValueError(f"the shares of the splits are at least 0 and sum to 1, not {said}.")
    whole = sum(share for split, share in _SHARES.items() if split not in told)
    return {split: told[split] if split in told else left * share / whole for split, share in _SHARES.items()}


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
