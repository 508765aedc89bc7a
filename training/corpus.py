"""Sample texts from the pocket grammar, with the probability of each derivation.

The grammar itself is data in ``training/grammar/``. A derivation's negative log-probability (nats) is summed
while it is sampled; its mean over texts is an upper bound on the grammar's entropy (two derivations may spell the same
text), which the trained model's loss is compared with.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from bisect import bisect
from dataclasses import dataclass, field
from itertools import accumulate

from mlxsteer.pocket.grammar import CODAS, ONSETS, VOWELS, Alternative, Rule, Slot, load_rules, load_tasks

# Share of the training tokens per behaviour, and which grammar symbol starts it ("words" is sampled by code).
TOKEN_SHARES = {
    "sentiment": 0.19,
    "formality": 0.14,
    "certainty": 0.11,
    "topic": 0.16,
    "chat": 0.28,
    "law": 0.06,
    "words": 0.06,
}
START = {kind: f"text.{kind}" for kind in TOKEN_SHARES if kind != "words"}

# Tasks that share input words compete for them; the shares keep their prompts ambiguous without examples.
TASK_WEIGHTS = {"antonym": 3, "comparative": 3, "plural": 3, "past": 3, "gerund": 3, "capital": 2, "nationality": 2,
                "upper_adjective": 2, "upper_noun": 3, "upper_verb": 2}  # fmt: skip

TRAIN, COMBINATION, HELD_OUT = "train", "combination", "held_out"
EVERYTHING = "everything"
_ARTICLE = re.compile(r"\b([Aa])\(n\) (?=(\w+))")
_VOWEL_SOUND = re.compile(r"(?!uni|use|one|eu|ut)[aeiou]|hour|honest", re.IGNORECASE)


def settle_articles(text: str) -> str:
    """Write ``a(n)`` as ``a`` or ``an`` by the word that follows."""
    return _ARTICLE.sub(lambda m: m[1] + ("n " if _VOWEL_SOUND.match(m[2]) else " "), text)


@dataclass(frozen=True)
class Choices:
    """The alternatives of a rule that a mode allows, ready for sampling."""

    alternatives: tuple[Alternative, ...]
    cumulative: tuple[float, ...]
    probabilities: tuple[float, ...]
    costs: tuple[float, ...]  # nats


def allowed(rule: Rule, mode: str) -> Choices:
    """Alternatives for a mode: training ones, only held-out ones where there are any, or all."""
    held_out = [a for a in rule.alternatives if a.held_out]
    kept = [a for a in rule.alternatives if not a.held_out]
    if mode == EVERYTHING:
        kept = list(rule.alternatives)
    elif mode == HELD_OUT and held_out:
        kept = held_out
    if not kept:
        # A rule whose every alternative is held out (held words); only held-out texts come here.
        kept = held_out
    total = sum(a.weight for a in kept)
    probabilities = tuple(a.weight / total for a in kept)
    return Choices(
        tuple(kept), tuple(accumulate(probabilities)), probabilities, tuple(-math.log(p) for p in probabilities)
    )


@dataclass
class Sampler:
    """Draws texts. ``mode`` is "train", "combination" (known words, held-out phrases) or "held_out"."""

    seed: int = 0
    mode: str = TRAIN
    nats: float = 0.0  # cost of the last text
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.rules = load_rules()
        self.tasks = load_tasks()
        self.copy_words = self.rules["thing.noun"].words()
        self._choices: dict[tuple[str, str], Choices] = {}
        self._variables: dict[str, str] = {}
        self._taken: dict[str, set[int]] = {}

    def text(self, symbol: str, variables: dict[str, str] | None = None) -> str:
        """Expand a symbol to a text; ``self.nats`` is then its cost."""
        self.nats = 0.0
        self._variables = dict(variables or {})
        self._taken = {}
        return settle_articles(self._expand(symbol, self.mode))

    @property
    def variables(self) -> dict[str, str]:
        """What the last text stored: ``item``, ``t``, ``deed``, ..."""
        return {name: settle_articles(value) for name, value in self._variables.items()}

    def draw(self, kind: str) -> str:
        """A whole text of a behaviour (a key of ``TOKEN_SHARES``)."""
        return self.word_text() if kind == "words" else self.text(START[kind])

    def _expand(self, symbol: str, mode: str, fresh: bool = False) -> str:
        rule = self.rules[symbol]
        if rule.hold_out_every and mode in (TRAIN, COMBINATION):
            return self._expand_by_hash(rule, mode, fresh)
        return self._expand_rule(rule, mode, fresh)

    def _expand_by_hash(self, rule: Rule, mode: str, fresh: bool) -> str:
        """Redraw until the expansion lies on the wanted side of the hash split."""
        held_share = 1.0 / rule.hold_out_every
        wanted = mode == COMBINATION
        while True:
            before = self.nats
            text = self._expand_rule(rule, TRAIN, fresh)
            if (zlib.crc32(text.encode()) % rule.hold_out_every == 0) == wanted:
                self.nats += math.log(held_share if wanted else 1.0 - held_share)
                return text
            self.nats = before

    def _expand_rule(self, rule: Rule, mode: str, fresh: bool) -> str:
        key = (rule.name, mode)
        choices = self._choices.get(key)
        if choices is None:
            choices = self._choices[key] = allowed(rule, mode)
        index = self._pick_fresh(rule.name, choices) if fresh else self._pick(choices)
        pieces = [
            part if isinstance(part, str) else self._fill(part, mode) for part in choices.alternatives[index].parts
        ]
        text = "".join(pieces)
        return text[:1].upper() + text[1:] if rule.name.startswith("s.") else text

    def _pick(self, choices: Choices) -> int:
        index = min(bisect(choices.cumulative, self.rng.random()), len(choices.costs) - 1)
        self.nats += choices.costs[index]
        return index

    def _pick_fresh(self, name: str, choices: Choices) -> int:
        """An alternative not taken before in this text; its cost is that of the renormalised choice."""
        taken = self._taken.setdefault(name, set())
        if len(taken) >= len(choices.costs):
            taken.clear()
        free = 1.0 - sum(choices.probabilities[i] for i in taken)
        while True:
            index = min(bisect(choices.cumulative, self.rng.random()), len(choices.costs) - 1)
            if index not in taken:
                taken.add(index)
                self.nats += choices.costs[index] + math.log(free)
                return index

    def _fill(self, slot: Slot, mode: str) -> str:
        if slot.kind == "copy":
            return self._variables[slot.name]
        if slot.kind == "builtin":
            return self._invent(slot.name)
        text = self._expand(slot.name, EVERYTHING if slot.everything else mode, slot.fresh)
        if slot.store:
            self._variables[slot.store] = text
            if slot.silent:
                return ""
        return text

    def _invent(self, name: str) -> str:
        """``{~word}``, ``{~Name}``: syllables; ``{~capital}``: store a country with its capital."""
        if name == "capital":
            countries = list(self.tasks["capital"].items())
            self._variables["country"], self._variables["capital"] = self._uniform(countries)
            return ""
        syllables = 3 if self.rng.random() < 0.25 else 2
        self.nats -= math.log(0.25 if syllables == 3 else 0.75)
        word = "".join(self._uniform(ONSETS) + self._uniform(VOWELS) + self._uniform(CODAS) for _ in range(syllables))
        return word.capitalize() if name == "Name" else word

    def _uniform(self, items):
        self.nats += math.log(len(items))
        return items[int(self.rng.random() * len(items))]

    def word_text(self) -> str:
        """Lines ``input -> answer`` of one task, or copies (``hot -> hot``), the default without examples."""
        self.nats = 0.0
        kind = self._pick_weighted({"task": 9, "copy": 9, "copies": 2})
        if kind == "task":
            task = self._pick_weighted(TASK_WEIGHTS)
            pairs = list(self.tasks[task].items())
            count = 3 + int(self.rng.random() * 6)
            self.nats += math.log(6) + sum(math.log(len(pairs) - i) for i in range(count))
            chosen = self.rng.sample(pairs, count)
        else:
            count = 1
            if kind == "copies":
                count = 2 + int(self.rng.random() * 5)
                self.nats += math.log(5)
            words = [self._copy_word() for _ in range(count)]
            chosen = [(word, word) for word in words]
        return "".join(f"{left} -> {right}\n" for left, right in chosen)

    def _copy_word(self) -> str:
        source = self._pick_weighted({"task": 8, "noun": 1, "invented": 1})
        if source == "task":
            return self._uniform(list(self.tasks[self._pick_weighted(TASK_WEIGHTS)]))
        return self._uniform(self.copy_words) if source == "noun" else self._invent("word")

    def _pick_weighted(self, weights: dict[str, float]) -> str:
        total = sum(weights.values())
        point = self.rng.random() * total
        chosen = next(iter(weights))
        for chosen, weight in weights.items():  # noqa: B007
            point -= weight
            if point < 0:
                break
        self.nats -= math.log(weights[chosen] / total)
        return chosen
