"""Score a text of the pocket model against the grammar it was trained on.

For a completion and the prompt that it follows: the share of attribute words of each side, whether it is grammatical,
whether it refuses, which topic it is about, whether a word-pair answer is right. The rules and lexicons are the
files in ``mlxsteer/pocket/grammar/``, so the scores are exact for texts of that language, and only for those.

    >>> from mlxsteer.pocket import scorer
    >>> scorer.side("sentiment", " delicious. The sauce was really great.")
    'pos'
    >>> scorer.grammatical(" delicious. The sauce was really great.", prompt="The soup was")
    True
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from mlxsteer.pairs import nearest

from .grammar import INVENTED_PATTERN, SIDES, TOPICS, Rule, Slot, load_rules, load_tasks, variable_symbols

# Which symbols' words count for a side, besides its ``phrases.…``.
_SIDE_SYMBOLS = {
    "pos": ("adj.general.pos", "adj.own.pos", "verb.pos"),
    "neg": ("adj.general.neg", "adj.own.neg", "verb.neg"),
}
_TOKEN = re.compile(r"a\(n\)|A\(n\)|[A-Za-z]+(?:-[A-Za-z]+)*|'[A-Za-z]+|\d+|[^\sA-Za-z\d]")
_CHAT_TOKEN = re.compile(r"<\|(?:system|user|assistant|end)\|>|</?s>|<pad>")
_ARTICLE = re.compile(r"\b([Aa])(n?) (?=(\w+))")
_VOWEL_SOUND = re.compile(r"(?!uni|use|one|eu|ut)[aeiou]|hour|honest", re.IGNORECASE)
_MONTH = re.compile(r"\bMay\b")  # the verb, a hedge, never begins a sentence in this language
_SENTENCE_END = (".", "!", "?")
_Items = tuple[str | Slot, ...]
# A last word that may be cut in two, and an article left without its noun.
_CUT_OFF = re.compile(r"(?:\b[Aa]n?\s+)?(?<![\w'-])[\w'-]*$")


@dataclass(frozen=True)
class Score:
    """What the grammar says about one completion."""

    counts: dict[str, int]  # attribute words found, by side or topic
    share: float | None  # of the first side among the attribute words; None without any, and of topics
    side: str | None  # the side or topic with most words; None for none or a tie
    grammatical: bool
    refused: bool


# ---------------------------------------------------------------------------------------------- attribute words
def side_words(side: str) -> set[str]:
    """The words and phrases that count for a side (``pos``, ``formal``, ``hedged``, ...)."""
    rules = load_rules()
    words = set(rules[f"phrases.{side}"].words())
    for prefix in _SIDE_SYMBOLS.get(side, ()):
        for name, rule in rules.items():
            if name == prefix or name.startswith(prefix + "."):
                words.update(rule.words())
    return words


def topic_words(topic: str) -> set[str]:
    """Nouns, adjectives, places and actions of a topic."""
    rules = load_rules()
    return {
        word for part in ("who", "what", "like", "where", "do", "happen") for word in rules[f"{part}.{topic}"].words()
    }


def word_pattern(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern for whole words or phrases, longest first, any case."""
    ordered = sorted(words, key=lambda word: (-len(word), word))
    return re.compile(r"(?<![\w-])(?:" + "|".join(map(re.escape, ordered)) + r")(?![\w-])", re.IGNORECASE)


@cache
def _patterns(behaviour: str) -> dict[str, re.Pattern[str]]:
    """One pattern per side (or topic), without the words that two of them share."""
    if behaviour == "topic":
        words = {topic: topic_words(topic) for topic in TOPICS}
    elif behaviour in SIDES:
        words = {side: side_words(side) for side in SIDES[behaviour]}
    else:
        raise ValueError(f"no sides of {behaviour!r}. {nearest(behaviour, [*SIDES, 'topic'])}")
    patterns = {}
    for name, own in words.items():
        others = set().union(*(other for key, other in words.items() if key != name))
        patterns[name] = word_pattern(own - others)
    return patterns


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"a text is scored, not {type(text).__name__}; of several, score each.")


def counts(behaviour: str, text: str) -> dict[str, int]:
    """Attribute words per side of ``sentiment``, ``formality``, ``certainty``, or per topic of ``topic``."""
    _check_text(text)
    text = _MONTH.sub("", text)
    return {name: len(pattern.findall(text)) for name, pattern in _patterns(behaviour).items()}


def share(behaviour: str, text: str) -> float | None:
    """Share of the first side (positive, formal, certain) among the attribute words; None without any."""
    if behaviour not in SIDES:
        raise ValueError(f"{behaviour!r} has no two sides. {nearest(behaviour, SIDES)}")
    first, second = counts(behaviour, text).values()
    return first / (first + second) if first + second else None


def side(behaviour: str, text: str) -> str | None:
    """The side (or topic) with most attribute words; None for none or a tie."""
    found = counts(behaviour, text)
    best = max(found.values())
    leaders = [name for name, count in found.items() if count == best]
    return leaders[0] if best and len(leaders) == 1 else None


def topic(text: str) -> str | None:
    """The main topic of a text, or None."""
    return side("topic", text)


def mentions(text: str, topic_name: str) -> bool:
    """Whether a word of the topic occurs at all (a leak into a text about something else)."""
    if topic_name not in TOPICS:
        raise ValueError(f"no topic {topic_name!r}. {nearest(topic_name, TOPICS)}")
    _check_text(text)
    return bool(_patterns("topic")[topic_name].search(text))


# -------------------------------------------------------------------------------------------- refusal and tasks
@cache
def _refusal_pattern() -> re.Pattern[str]:
    return word_pattern(load_rules()["phrases.refusal"].words())


def refused(text: str) -> bool:
    """Whether an answer, or the last one of a chat, has one of the grammar's refusing phrases in its first sentence."""
    _check_text(text)
    text = text.rpartition("<|assistant|>")[2].replace("’", "'")
    return bool(_refusal_pattern().search(first_sentence(text)))


def first_sentence(text: str) -> str:
    """Up to the first full stop, question or exclamation mark."""
    text = _CHAT_TOKEN.sub("", text).strip()
    match = re.search(r"[.!?]", text)
    return text[: match.end()] if match else text


def right_answer(task: str, word: str) -> str:
    """The answer that a word-pair task wants."""
    tasks = load_tasks()
    if task not in tasks:
        raise ValueError(f"no task {task!r}. {nearest(task, tasks)}")
    if word not in tasks[task]:
        raise ValueError(f"the task {task!r} has no word {word!r}. {nearest(word, tasks[task], 'load_tasks()')}")
    return tasks[task][word]


def answer_is_right(task: str, word: str, completion: str) -> bool:
    """Whether the first line after ``word ->`` is the answer."""
    return completion.strip().split("\n")[0].strip() == right_answer(task, word)


def judge(behaviour: str) -> Callable[[str], float]:
    """A function from a text to a number, for `generation_sweep(scorer=)`.

    Args:
        behaviour: ``"sentiment"``, ``"formality"`` or ``"certainty"``: 1 where most attribute words are of the first
            side (positive, formal, certain), 0 where they are of the other, 0.5 without any or at a tie.
            ``"refusal"``: 1 for an answer that refuses, else 0. A topic such as ``"ocean"``: 1 for a text whose main
            topic it is, else 0.

    Raises:
        ValueError: it is none of these.

    >>> judge("formality")(" Dear Mr. Walsh, I am writing to inform you about the report.")
    1.0
    """
    if behaviour in SIDES:
        values = dict(zip(SIDES[behaviour], (1.0, 0.0), strict=True))
        return lambda text: values.get(side(behaviour, text) or "", 0.5)
    if behaviour == "refusal":
        return lambda text: float(refused(text))
    if behaviour in TOPICS:
        return lambda text: float(topic(text) == behaviour)
    raise ValueError(
        f"no judge of {behaviour!r}. {nearest(behaviour, [*SIDES, 'refusal', *TOPICS], 'SIDES and TOPICS')}"
    )


# ---------------------------------------------------------------------------------------------------- grammar
def tokenize(text: str) -> list[str]:
    """Words and marks; an article that fits the next word becomes ``a(n)``."""

    def normal(match: re.Match[str]) -> str:
        fits = bool(match[2]) == bool(_VOWEL_SOUND.match(match[3]))
        return f"{match[1]}(n) " if fits else f"{match[1]}!{match[2]} "

    return _TOKEN.findall(_ARTICLE.sub(normal, text.replace("a(n) ", "a ").replace("A(n) ", "A ")))


def _literal(part: str) -> tuple[str, ...]:
    """Tokens of a rule's plain text; its articles always stand for ``a(n)``."""
    return tuple("a(n)" if token in ("a", "an") else token for token in _TOKEN.findall(part))


@cache
def _compiled(name: str) -> tuple[dict[str, tuple[_Items, ...]], tuple[_Items, ...]]:
    """A rule's alternatives as token and slot sequences: those by first token (lower case), and the rest."""
    by_first: dict[str, list[_Items]] = {}
    rest: list[_Items] = []
    rule: Rule = load_rules()[name]
    for alternative in rule.alternatives:
        items: list[str | Slot] = []
        for part in alternative.parts:
            if isinstance(part, str):
                items.extend(_literal(part))
            elif not part.silent and not (part.kind == "builtin" and part.name == "capital"):
                items.append(part)
        if items and isinstance(items[0], str):
            by_first.setdefault(items[0].lower(), []).append(tuple(items))
        else:
            rest.append(tuple(items))
    return {key: tuple(value) for key, value in by_first.items()}, tuple(rest)


@cache
def _sentence_symbols() -> tuple[str, ...]:
    return tuple(name for name in load_rules() if name.startswith(("s.", "c.")))


@cache
def _variables() -> dict[str, tuple[str, ...]]:
    return {name: tuple(sorted(symbols)) for name, symbols in variable_symbols().items()}


class Parser:
    """Recognises token sequences as sequences of the grammar's sentences (memoised recursive descent)."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.ran_out = False  # a match wanted more tokens than there are: the text may go on
        self._memo: dict[tuple[str, int, bool], frozenset[int]] = {}

    def ends(self, symbol: str, start: int, capital: bool) -> frozenset[int]:
        """Where expansions of ``symbol`` from token ``start`` can end; ``capital`` asks for a capital first letter."""
        key = (symbol, start, capital)
        if key in self._memo:
            return self._memo[key]
        capital = capital or symbol.startswith("s.")
        found: set[int] = set()
        by_first, rest = _compiled(symbol)
        if start < len(self.tokens):
            candidates = by_first.get(self.tokens[start].lower(), ())
        else:
            self.ran_out = True
            candidates = ()
        for items in (*candidates, *rest):
            found |= self._sequence(items, start, capital)
        self._memo[key] = frozenset(found)
        return self._memo[key]

    def _sequence(self, items: _Items, start: int, capital: bool) -> set[int]:
        places = {start}
        for index, item in enumerate(items):
            first = capital and index == 0
            after: set[int] = set()
            for place in places:
                if isinstance(item, str):
                    if self._is_token(place, item, first):
                        after.add(place + 1)
                else:
                    after |= self._slot(item, place, first)
            places = after
            if not places:
                break
        return places

    def _is_token(self, place: int, wanted: str, capital: bool) -> bool:
        if place >= len(self.tokens):
            self.ran_out = True
            return False
        return self.tokens[place] == (wanted[:1].upper() + wanted[1:] if capital else wanted)

    def _slot(self, slot: Slot, place: int, capital: bool) -> set[int]:
        if slot.kind == "builtin":
            if place >= len(self.tokens):
                self.ran_out = True
                return set()
            token = self.tokens[place]
            upper = token[:1].isupper()
            fits = INVENTED_PATTERN.fullmatch(token) and upper == (slot.name == "Name" or capital)
            return {place + 1} if fits else set()
        symbols = (slot.name,) if slot.kind == "symbol" else _variables()[slot.name]
        return set().union(*(self.ends(symbol, place, capital) for symbol in symbols))

    def sentences_from(self, start: int) -> tuple[bool, int]:
        """(whether sentences cover the tokens from ``start`` or can go on past their end, furthest sentence end)."""
        reached, queue = {start}, [start]
        viable = False
        while queue:
            place = queue.pop()
            if place == len(self.tokens):
                viable = True
                continue
            self.ran_out = False
            for symbol in _sentence_symbols():
                for end in self.ends(symbol, place, False):
                    if end > place and end not in reached:
                        reached.add(end)
                        queue.append(end)
            # Memoised pieces do not set the flag again: ask once more with a fresh memo.
            viable = viable or self.ran_out or self._unfinished(place)
        return viable, max(reached)

    def _unfinished(self, place: int) -> bool:
        """Whether a sentence that starts at ``place`` can go on past the last token."""
        fresh = Parser(self.tokens)
        for symbol in _sentence_symbols():
            fresh.ends(symbol, place, False)
        return fresh.ran_out


def grammatical(text: str, prompt: str = "", complete: bool = False) -> bool:
    """Whether a completion consists of sentences of the grammar (the last may be cut off unless ``complete``).

    A plain prompt is parsed together with its completion, so that the sentence across the border counts. After a chat
    prompt the answer stands alone. When the prompt itself is outside the grammar, parsing starts at the completion's
    first full sentence. A text that is one unfinished sentence is taken for the beginning of one; time grows with the
    number of sentences (1,000 take seconds).
    """
    _check_text(text)
    text = _CHAT_TOKEN.split(text)[0] if not text.startswith("<") else _CHAT_TOKEN.sub(" ", text)
    if _CHAT_TOKEN.search(prompt):
        prompt = ""
    before = tokenize(prompt)
    # mlx-lm's detokenizer drops the space that a completion begins with.
    whole = f"{prompt} {text}" if prompt and text[:1].isalnum() and not prompt[-1:].isspace() else prompt + text
    if not complete and not whole.rstrip().endswith(_SENTENCE_END):
        whole = _CUT_OFF.sub("", whole)
    tokens = tokenize(whole)
    if len(tokens) <= len(before):
        return bool(text.strip())
    if before and not Parser(before).sentences_from(0)[0]:
        starts = [i + 1 for i, token in enumerate(tokens[:-1]) if token in _SENTENCE_END and i >= len(before)]
        return bool(starts) and _covered(tokens, starts[0], complete)
    return _covered(tokens, 0, complete)


def _covered(tokens: list[str], start: int, complete: bool) -> bool:
    viable, furthest = Parser(tokens).sentences_from(start)
    return furthest == len(tokens) if complete else viable


def score(behaviour: str, text: str, prompt: str = "") -> Score:
    """Everything the grammar can say about one completion, for a behaviour that ``counts`` takes."""
    first = share(behaviour, text) if behaviour in SIDES else None
    return Score(counts(behaviour, text), first, side(behaviour, text), grammatical(text, prompt), refused(text))
