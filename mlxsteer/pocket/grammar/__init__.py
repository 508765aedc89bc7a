"""The grammar that the pocket model was trained on: its rule files, read into plain data (standard library only).

The notation is described in ``README.md`` beside this file. The corpus generator (``training/corpus.py``) samples
from these rules; the scorer (``mlxsteer/pocket/scorer.py``) parses texts with them.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
RULE_FILES = ("common.txt", "topics.txt", "sentiment.txt", "formality.txt", "certainty.txt", "chat.txt")

TOPICS = ("ocean", "space", "kitchen", "garden", "city", "forest", "music", "winter", "sport", "farm")
SIDES = {"sentiment": ("pos", "neg"), "formality": ("formal", "casual"), "certainty": ("certain", "hedged")}

# Invented words: two or three syllables, each an onset, a vowel and a coda. They force the model to copy.
ONSETS = (
    "b",
    "d",
    "f",
    "g",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "br",
    "dr",
    "gl",
    "pl",
    "sk",
    "tr",
    "sh",
    "ch",
)
VOWELS = ("a", "e", "i", "o", "u")
CODAS = ("", "", "", "n", "r", "l", "m", "x", "t", "sk")
INVENTED_PATTERN = re.compile(
    rf"(?:(?:{'|'.join(sorted(ONSETS, key=len, reverse=True))})[aeiou](?:sk|[nrlmxt])?){{2,3}}", re.IGNORECASE
)

_SLOT = re.compile(r"\{(=|~)?([\w.]+)(%)?(\*)?(?:([:!])([\w.]+))?\}")
_RULE = re.compile(r"([\w.@]+)\s+(?:(%)(\d+)\s+)?(=|~|~~|==)\s(.*)", re.DOTALL)


@dataclass(frozen=True)
class Slot:
    """One ``{...}`` of a rule: expand a symbol, write a stored text again, or invent a word."""

    kind: str  # "symbol", "copy" or "builtin"
    name: str  # the symbol, the variable or the builtin
    store: str | None = None  # the variable that keeps the text
    silent: bool = False  # stored, not written
    fresh: bool = False  # an alternative not taken before in this text
    everything: bool = False  # held-out alternatives included


@dataclass(frozen=True)
class Alternative:
    """One right-hand side of a rule, with its weight (not normalised)."""

    parts: tuple[str | Slot, ...]
    weight: float
    held_out: bool


@dataclass(frozen=True)
class Rule:
    """All alternatives of one symbol; ``hold_out_every`` holds out expansions by hash (0: none)."""

    name: str
    alternatives: tuple[Alternative, ...]
    hold_out_every: int = 0

    def words(self) -> list[str]:
        """The alternatives that are plain text, held-out ones included."""
        texts = ([part for part in a.parts if isinstance(part, str)] for a in self.alternatives)
        return ["".join(text) for text, a in zip(texts, self.alternatives, strict=True) if len(text) == len(a.parts)]


def parse_alternative(source: str, weight: float) -> Alternative:
    """Read one alternative: ``^`` (held out), ``3*`` (weight), then text with slots."""
    held_out = source.startswith("^")
    source = source.removeprefix("^")
    if match := re.match(r"(\d+)\*", source):
        weight *= int(match[1])
        source = source[match.end() :]
    parts: list[str | Slot] = []
    position = 0
    for match in _SLOT.finditer(source):
        if match.start() > position:
            parts.append(source[position : match.start()])
        mark, name, fresh, everything, how, store = match.groups()
        kind = {"=": "copy", "~": "builtin", None: "symbol"}[mark]
        parts.append(Slot(kind, name, store, how == "!", bool(fresh), bool(everything)))
        position = match.end()
    if position < len(source):
        parts.append(source[position:])
    return Alternative(tuple(parts), weight, held_out)


def parse_rule(source: str) -> Rule:
    """Read one rule (continuation lines already joined)."""
    match = _RULE.fullmatch(source)
    if match is None:
        raise ValueError(f"not a rule: {source[:80]!r}")
    name, _, every, operator, body = match.groups()
    if operator in ("~~", "=="):
        pieces = [word.replace("_", " ") for word in body.split()]
    else:
        pieces = [piece.strip() for piece in body.split("|") if piece.strip()] or [body.strip()]
        # '|' inside a chat token such as <|user|> is not a separator.
        if "<|" in body:
            pieces = [piece.strip() for piece in re.split(r"(?<!<)\|(?!>)", body) if piece.strip()]
    zipf = operator in ("~", "~~")
    alternatives = [parse_alternative(piece, 1.0 / (rank + 2) if zipf else 1.0) for rank, piece in enumerate(pieces)]
    return Rule(name, tuple(alternatives), int(every or 0))


def expand_parameters(source: str, values: dict[str, list[str]]) -> list[str]:
    """Write a rule once for every value of the parameters (``@S``) in its name."""
    name = source.split(None, 1)[0]
    used = re.findall(r"@([A-Z])", name)
    expanded = []
    for choice in itertools.product(*(values[letter] for letter in used)):
        text = source
        for letter, value in zip(used, choice, strict=True):
            text = text.replace(f"@{letter}", f".{value}")
        expanded.append(text)
    return expanded


@cache
def load_rules() -> dict[str, Rule]:
    """All rules by symbol, parameters written out. Raises on a slot that names no symbol."""
    values: dict[str, list[str]] = {}
    sources: list[str] = []
    for file in RULE_FILES:
        for line in (HERE / file).read_text(encoding="utf-8").splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            if match := re.fullmatch(r"@([A-Z]): (.*)", line):
                values[match[1]] = match[2].split()
            elif line.startswith(" "):
                sources[-1] += " " + line.strip()
            else:
                sources.append(line)
    rules: dict[str, Rule] = {}
    for source in sources:
        for text in expand_parameters(source, values):
            rule = parse_rule(text)
            if rule.name in rules:
                raise ValueError(f"the rule {rule.name!r} is written twice")
            rules[rule.name] = rule
    for rule in rules.values():
        for part in itertools.chain.from_iterable(a.parts for a in rule.alternatives):
            if isinstance(part, Slot) and part.kind == "symbol" and part.name not in rules:
                raise ValueError(f"the rule {rule.name!r} names {part.name!r}, which does not exist")
    return rules


@cache
def load_tasks() -> dict[str, dict[str, str]]:
    """The word-pair tasks: task -> {input word: answer}."""
    return json.loads((HERE / "tasks.json").read_text(encoding="utf-8"))


def variable_symbols() -> dict[str, set[str]]:
    """Which symbols each stored variable can hold: variable -> symbols."""
    symbols: dict[str, set[str]] = {"country": {"country.name"}, "capital": {"capital.name"}}
    for rule in load_rules().values():
        for part in itertools.chain.from_iterable(a.parts for a in rule.alternatives):
            if isinstance(part, Slot) and part.store:
                symbols.setdefault(part.store, set()).add(part.name)
    return symbols
