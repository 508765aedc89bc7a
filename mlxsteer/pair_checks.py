"""What makes contrast pairs good ones, and whether a set of them is."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import SPLITS, ContrastPair, context, counted, folded, side_texts

ENOUGH_PAIRS = 80
"""Steering gains little from more pairs than this (arXiv 2505.03189)."""

# Scripts that put no space between words.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
_LETTER = re.compile(r"\s*[(\[]?([A-Z])[)\].:]?\s*")


@dataclass(frozen=True)
class Finding:
    """What was found of one property.

    Attributes:
        property: what was looked at, such as ``"length"``.
        level: ``"ok"``, ``"warning"`` (look at it) or ``"error"`` (mend it).
        sentence: what was found, with figures.
        rows: numbers of up to five pairs to look at, from 0.
    """

    property: str
    level: Literal["ok", "warning", "error"]
    sentence: str
    rows: tuple[int, ...] = ()


@dataclass(frozen=True, repr=False)
class Check:
    """What `PairSet.check` found: at least one finding for each property of good contrast pairs.

    Attributes:
        name: the set's name.
        pairs: how many pairs it has.
        findings: what was found, property by property.
    """

    name: str
    pairs: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error; there may be warnings."""
        return not self.errors

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings to look at."""
        return tuple(finding for finding in self.findings if finding.level == "warning")

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings to mend before the pairs are used."""
        return tuple(finding for finding in self.findings if finding.level == "error")

    def as_dict(self) -> dict[str, Any]:
        """The whole check as plain values for a JSON file."""
        findings = [asdict(finding) | {"rows": list(finding.rows)} for finding in self.findings]
        return {"name": self.name, "pairs": self.pairs, "ok": self.ok, "findings": findings}

    def __repr__(self) -> str:
        errors, warnings = counted(len(self.errors), "error"), counted(len(self.warnings), "warning")
        return f"{self.name or 'contrast pairs'}: {counted(self.pairs, 'pair')}, {errors}, {warnings}"

    def __str__(self) -> str:
        lines = [repr(self)]
        width = max(len(finding.property) for finding in self.findings)
        for level, of, sentence, rows in ((f.level, f.property, f.sentence, f.rows) for f in self.findings):
            shown = f" Rows: {', '.join(map(str, rows))}." if rows else ""
            lines.append(f"  {level:<7}  {of:<{width}}  {sentence}{shown}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Row:
    """A pair as the properties look at it.

    Attributes:
        number: which pair of the set it is, from 0.
        pair: the pair.
        context: what the sides begin with: the prompt or messages, else the whole words that both begin with.
        sides: the rest of the positive and the negative side.
    """

    number: int
    pair: ContrastPair
    context: str
    sides: tuple[str, str]

    @staticmethod
    def of(number: int, pair: ContrastPair) -> _Row:
        before = context(pair)
        if before:
            return _Row(number, pair, before, (pair.positive, pair.negative))
        sides = pair.positive, pair.negative
        shared = next((i for i, (p, n) in enumerate(zip(*sides, strict=False)) if p != n), min(map(len, sides)))
        words = re.sub(r"\S+\Z", "", pair.positive[:shared])  # the sides keep whole words
        return _Row(number, pair, words, (pair.positive[len(words) :], pair.negative[len(words) :]))

    @property
    def prompted(self) -> bool:
        return bool(self.pair.prompt or self.pair.messages)

    @property
    def letters(self) -> tuple[str, str] | None:
        """The options that the sides name, such as A and B for `` (A)`` and `` (B)``."""
        positive, negative = map(_LETTER.fullmatch, self.sides)
        return (positive[1], negative[1]) if positive and negative else None


def check_pairs(pairs: Sequence[ContrastPair], tokenizer: Any = None) -> Check:
    """Look at every property of good contrast pairs; `PairSet.check` is the way to it.

    Args:
        pairs: the pairs, with a `name` where they are a `PairSet`.
        tokenizer: measures lengths in tokens, by its `encode`; in characters without one. A model's own where an
            `InterpretableModel` is given.

    Raises:
        TypeError: the tokenizer has no `encode`, or the model no tokenizer.
    """
    if isinstance(tokenizer, InterpretableModel):
        if tokenizer.tokenizer is None:
            raise TypeError("this model was given without a tokenizer, and lengths in tokens need one.")
        tokenizer = tokenizer.tokenizer
    if isinstance(tokenizer, str) or (tokenizer is not None and not callable(getattr(tokenizer, "encode", None))):
        raise TypeError(f"a tokenizer turns texts to token ids by its `encode`; {tokenizer!r} can't.")
    name = getattr(pairs, "name", "")
    if not pairs:
        return Check(name, 0, (Finding("number", "error", "There are no pairs."),))
    rows = [_Row.of(number, pair) for number, pair in enumerate(pairs)]
    properties: dict[str, Callable[[list[_Row]], Iterator[_Found]]] = {
        "matched context": _matched_context,
        "clear difference": _clear_difference,
        "diversity": _diversity,
        "length": partial(_length, tokenizer),
        "duplicates": _duplicates,
        "splits disjoint": _splits_disjoint,
        "letters balanced": _letters_balanced,
        "number": _number,
        "spaces": _spaces,
    }
    findings = [
        Finding(of, level, sentence, tuple(row.number for row in shown[:5]))
        for of, found in properties.items()
        for level, sentence, shown in found(rows)
    ]
    return Check(name, len(pairs), tuple(findings))


_Found = tuple[Literal["ok", "warning", "error"], str, Sequence[_Row]]


def _matched_context(rows: list[_Row]) -> Iterator[_Found]:
    alone = [row for row in rows if not row.prompted]
    unmatched = [row for row in alone if _in_common(row) < 0.2]
    if len(unmatched) > len(alone) / 10:
        yield (
            "warning",
            f"In {counted(len(unmatched), 'pair')} of {len(alone)} without a prompt, less than 20% of the text is "
            "common to both sides: they may differ in more than the behaviour.",
            unmatched,
        )
    elif alone:
        shares = sorted(map(_in_common, alone))
        yield (
            "ok",
            f"The sides of {counted(len(alone), 'pair')} without a prompt have {shares[len(shares) // 2]:.0%} of their "
            "text in common (median); other pairs share a prompt.",
            (),
        )
    else:
        yield "ok", "The sides of every pair share a prompt.", ()


def _in_common(row: _Row) -> float:
    """The share of two whole texts that both have: what they begin with, or the words that are in both."""
    positive, negative = row.pair.positive, row.pair.negative
    begun = 2 * len(row.context) / (len(positive) + len(negative))
    ours, theirs = Counter(_words(positive)), Counter(_words(negative))
    return max(begun, 2 * (ours & theirs).total() / max(1, (ours + theirs).total()))


def _words(text: str) -> list[str]:
    """The words of a text, or its characters where its script puts no space between words."""
    return list("".join(text.split())) if any(map(_is_unspaced, text)) else folded(text).split()


def _clear_difference(rows: list[_Row]) -> Iterator[_Found]:
    bare = [(row, _bare(row.sides[0]), _bare(row.sides[1])) for row in rows]
    same = [row for row, positive, negative in bare if positive == negative]
    if same:
        level: Literal["warning", "error"] = "warning" if len(same) == len(rows) else "error"
        fine = "; fine where that is the behaviour" if level == "warning" else ""
        yield (
            level,
            f"In {counted(len(same), 'pair')} the sides differ only in case, punctuation or spaces{fine}.",
            same,
        )
    longer = [row for row, a, b in bare if a != b and (a.startswith(b) or b.startswith(a))]
    if len(longer) > len(rows) / 10:
        yield (
            "warning",
            f"In {counted(len(longer), 'pair')} of {len(rows)} one side is the other with more text at its end: the "
            "last tokens may differ for that alone.",
            longer,
        )
    if not same and len(longer) <= len(rows) / 10:
        yield "ok", "The sides of every pair differ in more than case, punctuation and spaces.", ()


def _bare(text: str) -> str:
    """A text without its case, punctuation and spaces; signs such as + and emoji stay."""
    return "".join(c for c in text.casefold() if not c.isspace() and unicodedata.category(c)[0] not in "PCZ")


def _diversity(rows: list[_Row]) -> Iterator[_Found]:
    said: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        if row.prompted:
            said[folded(row.context)].append(row)
    prompted = sum(map(len, said.values()))
    near = [row for prompt in _near_copies(list(said)) for row in said[prompt]]
    sides = [folded(side) for row in rows for side in row.sides]
    few_prompts, near_prompts = len(said) < prompted / 2, len(near) > prompted / 2
    few_sides = len(set(sides)) < len(sides) / 2 and not _is_lettered(rows)
    if few_prompts:
        repeated = [row for group in said.values() if len(group) > 1 for row in group]
        yield "warning", f"Only {len(said)} of {prompted} prompts are distinct.", repeated
    if near_prompts:
        yield "warning", f"{len(near)} of {prompted} prompts differ from another one in a single word.", near
    if few_sides:
        counts = Counter(sides)
        often = [row for row in rows if max(counts[folded(side)] for side in row.sides) > 1]
        yield (
            "warning",
            f"Only {len(counts)} of {len(sides)} completions are distinct: the vector may hold their words alone.",
            often,
        )
    if not (few_prompts or near_prompts or few_sides):
        prompts = f"{len(said)} of {prompted} prompts and " if prompted else ""
        yield "ok", f"{prompts}{len(set(sides))} of {len(sides)} completions are distinct.", ()


def _near_copies(prompts: list[str]) -> list[str]:
    """The prompts, of four words or more, that equal another one but for a single word."""
    # Two such prompts agree in what comes before and after that word, so equal hashes of both find them in one pass.
    alike: dict[tuple[int, int, int], set[int]] = defaultdict(set)
    for number, prompt in enumerate(prompts):
        words = prompt.split()
        if len(words) < 4:
            continue
        before, after = [0], [0]
        for word in words:
            before.append(hash((before[-1], word)))
        for word in reversed(words):
            after.append(hash((after[-1], word)))
        for place in range(len(words)):
            alike[len(words), before[place], after[len(words) - place - 1]].add(number)
    return [prompts[number] for number in sorted({n for group in alike.values() if len(group) > 1 for n in group})]


def _length(tokenizer: Any, rows: list[_Row]) -> Iterator[_Found]:
    lengths = [
        [len(side if tokenizer is None else tokenizer.encode(side, add_special_tokens=False)) for side in row.sides]
        for row in rows
    ]
    relative = [2 * abs(p - n) / max(1, p + n) for p, n in lengths]
    mean = sum(relative) / len(rows)
    unit = "characters" if tokenizer is None else "tokens"
    said = f"The sides of a pair differ in length by {mean:.0%} on average ({unit})"
    if mean > 0.3:
        worst = sorted(rows, key=lambda row: -relative[row.number])
        yield "warning", f"{said}; 30% is a fair limit.", worst
    one_way = False
    for side, sign in (("positive", 1), ("negative", -1)):
        longer = [row for row, (p, n) in zip(rows, lengths, strict=True) if sign * (p - n) > 0]
        if len(longer) > 0.8 * len(rows):
            one_way = True
            yield (
                "warning",
                f"The {side} side is the longer one in {len(longer)} of {counted(len(rows), 'pair')} ({unit}): the "
                "vector may hold length too.",
                longer,
            )
    if mean <= 0.3 and not one_way:
        yield "ok", f"{said}, and neither is mostly the longer one.", ()


def _duplicates(rows: list[_Row]) -> Iterator[_Found]:
    first: dict[tuple[str, str], _Row] = {}
    exact: list[_Row] = []
    near: list[_Row] = []
    swapped: list[_Row] = []
    for row in rows:
        texts = side_texts(row.pair)
        positive, negative = map(folded, texts)
        twin = first.setdefault((positive, negative), row)
        if twin is not row:
            (exact if side_texts(twin.pair) == texts else near).append(row)
        elif positive != negative and (other := first.get((negative, positive))):
            swapped += [other, row]
    if swapped:
        yield "error", f"Pairs that contradict another one, with the same sides swapped: {len(swapped) // 2}.", swapped
    if exact:
        yield "warning", f"Exact copies of earlier pairs: {len(exact)}; each counts again.", exact
    if near:
        yield "warning", f"Copies of earlier pairs but for case and spaces: {len(near)}; each counts again.", near
    if not (exact or near or swapped):
        yield "ok", "No pair is there twice.", ()


def _splits_disjoint(rows: list[_Row]) -> Iterator[_Found]:
    unsplit = [row for row in rows if row.pair.split is None]
    if len(unsplit) == len(rows):
        yield (
            "warning",
            "No pair names a split: what is chosen and reported on the pairs a vector was computed from looks better "
            "than it is. `with_splits` makes splits.",
            (),
        )
        return
    texts, prompts = defaultdict(set), defaultdict(set)
    for row in rows:
        for text in side_texts(row.pair):
            texts[folded(text)].add(row.pair.split)
        if row.prompted:
            prompts[folded(row.context)].add(row.pair.split)
    shared = [row for row in rows if any(len(texts[folded(text)] - {None}) > 1 for text in side_texts(row.pair))]
    known = {row.number for row in shared}
    prompt = [
        row
        for row in rows
        if row.number not in known and row.prompted and len(prompts[folded(row.context)] - {None}) > 1
    ]
    if shared:
        yield "error", f"Pairs with a text (prompt and side) that is in another split too: {len(shared)}.", shared
    if prompt:
        yield "warning", f"Pairs whose prompt is in another split too: {len(prompt)}.", prompt
    if unsplit:
        yield "warning", f"Pairs without a split, which are in none: {len(unsplit)}.", unsplit
    if not (shared or prompt or unsplit):
        yield "ok", "No prompt and no text is in two splits.", ()


def _is_lettered(rows: list[_Row]) -> bool:
    return all(row.letters for row in rows)


def _letters_balanced(rows: list[_Row]) -> Iterator[_Found]:
    if not _is_lettered(rows):
        yield "ok", "The completions are no option letters.", ()
        return
    one_sided = False
    for split in (*SPLITS, None):
        part = [row for row in rows if row.pair.split == split]
        counts = Counter(row.letters[0] for row in part if row.letters)
        for letter, count in counts.most_common(1):
            if count > math.ceil(0.6 * len(part)):
                one_sided = True
                where = f" of the split {split!r}" if split else ""
                always = count == len(part) >= 4
                sentence = f"The positive side is {letter} in {count} of {counted(len(part), 'pair')}{where}"
                much = "the vector is the letter" if always else "40% to 60% is fair, else the vector holds the letter"
                shown = [row for row in part if row.letters and row.letters[0] == letter]
                yield "error" if always else "warning", f"{sentence}: {much}.", shown
    if not one_sided:
        yield "ok", "No option letter is the positive one much more often than the other.", ()


def _number(rows: list[_Row]) -> Iterator[_Found]:
    splits = {row.pair.split for row in rows}
    train = [row for row in rows if row.pair.split == "train" or splits == {None}]
    if not train:
        yield "error", "No pair is in the split 'train': there is nothing to compute a vector from.", ()
    elif len(train) < ENOUGH_PAIRS:
        yield (
            "warning",
            f"{counted(len(train), 'pair')} to train on: more may help, up to about {ENOUGH_PAIRS} (arXiv 2505.03189).",
            (),
        )
    else:
        yield "ok", f"{len(train)} pairs to train on; beyond about {ENOUGH_PAIRS} more help little.", ()


def _spaces(rows: list[_Row]) -> Iterator[_Found]:
    texts = [row for row in rows if row.pair.prompt and not row.pair.chat]  # answers of a chat stand alone
    plain = [(row, row.context[-1], side[:1]) for row in texts for side in row.sides]
    glued = [
        row
        for row, end, start in plain
        if (_is_word(end) or end in ".,;:!?") and _is_word(start) and not (_is_unspaced(end) or _is_unspaced(start))
    ]
    doubled = [row for row, end, start in plain if end == start == " "]
    for found, what in ((glued, "a word follows the prompt without a space"), (doubled, "two spaces meet")):
        if found:
            shown = list({row.number: row for row in found}.values())
            yield "warning", f"In {counted(len(shown), 'pair')} {what} where the completion begins.", shown
    if not (glued or doubled):
        yield "ok", "Prompts and completions are joined with the spaces they need.", ()


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _is_unspaced(character: str) -> bool:
    return unicodedata.name(character, "").startswith(_UNSPACED)
