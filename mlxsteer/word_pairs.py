"""In-context prompts made of word pairs: examples of a task, and a word to do it to."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxsteer.pairs import check_seed, check_switch, nearest
from mlxsteer.questions import check_count

WordPair = tuple[str, str]


@dataclass(frozen=True)
class Template:
    """How examples are written.

    Attributes:
        example: one of them, with ``{input}`` and, at its end, ``{output}``; a question is the same without its output.
        separator: what stands between two of them.
        opening: what stands before the first.
    """

    example: str = "{input} -> {output}"
    separator: str = "\n"
    opening: str = ""

    def __post_init__(self) -> None:
        for name in ("example", "separator", "opening"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"template: {name} is a text, not {getattr(self, name)!r}.")
        once = self.example.count("{input}") == 1 and self.example.count("{output}") == 1
        if not once or not self.example.endswith("{output}") or not self.separator:
            raise ValueError(
                "template: an example has {input} once and ends with {output}, such as 'Q: {input}\\nA: {output}', and "
                f"a separator follows it, not {self.example!r} and {self.separator!r}."
            )

    def shown(self, pair: WordPair) -> str:
        """An example."""
        return self._question(pair[0]) + self.gap + pair[1]

    def _question(self, word: str) -> str:
        return self.example.removesuffix("{output}").rstrip().replace("{input}", word)

    @property
    def gap(self) -> str:
        """The blank between a question and its answer; a prompt ends before it, as a tokenizer wants it."""
        before = self.example.removesuffix("{output}")
        return before[len(before.rstrip()) :]

    def prompt(self, examples: Sequence[WordPair], word: str) -> str:
        """Examples, and the question."""
        return self.opening + self.separator.join([*map(self.shown, examples), self._question(word)])


TEMPLATES = {
    "arrow": Template(),
    "colon": Template("{input}: {output}"),
    "questions": Template("Q: {input}\nA: {output}", "\n\n"),
    "words": Template("Input: {input}\nOutput: {output}", "\n\n"),
}
"""Templates by name; ``"questions"`` is that of Todd et al. 2023."""


@dataclass(frozen=True)
class InContextPrompt:
    """A prompt of examples and a word.

    Attributes:
        text: the prompt.
        answer: what goes on from it if the task is done, with the blank before it.
        word: the word asked.
        examples: the pairs shown, with the outputs as they are shown.
        shuffled: whether the outputs shown belong to other inputs.
    """

    text: str
    answer: str
    word: str
    examples: tuple[WordPair, ...] = ()
    shuffled: bool = False


def word_pairs(given: Any, what: str = "pairs") -> list[WordPair]:
    """Word pairs as a list.

    Args:
        given: (input, output) pairs, or a dict from inputs to outputs.
        what: what to call them in a refusal.

    Raises:
        TypeError: they are no pairs of texts.
        ValueError: there are none, a text is empty, or an input is there twice.
    """
    if isinstance(given, Mapping):
        given = list(given.items())
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{what} are a list of (input, output), or a dict, not {given!r:.80}.")
    pairs = []
    for number, pair in enumerate(given):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(word, str) for word in pair):
            raise TypeError(f"{what}, number {number}: a pair is (input, output), two texts, not {pair!r:.80}.")
        if not all(word.strip() for word in pair):
            raise ValueError(f"{what}, number {number}: {tuple(pair)!r} has an empty text.")
        pairs.append((pair[0], pair[1]))
    if not pairs:
        raise ValueError(f"{what} are empty: give at least one (input, output).")
    seen = set[str]()
    for word, _ in pairs:
        if word in seen:
            raise ValueError(f"{what} have the input {word!r} twice.")
        seen.add(word)
    return pairs


def template_of(given: Any) -> Template:
    """A template, or the one of that name.

    Raises:
        TypeError: it is neither.
        ValueError: there is none of that name.
    """
    if isinstance(given, Template):
        return given
    if not isinstance(given, str):
        raise TypeError(f"template is a Template or a name such as 'arrow', not {given!r}.")
    if given not in TEMPLATES:
        raise ValueError(f"no template called {given!r}. {nearest(given, TEMPLATES, 'TEMPLATES')}")
    return TEMPLATES[given]


def in_context(
    pairs: Any,
    count: int | None = None,
    *,
    shots: int = 10,
    queries: Any = None,
    template: str | Template = "arrow",
    shuffled: bool = False,
    seed: int = 0,
) -> list[InContextPrompt]:
    """Prompts that show examples of a task and ask for one more.

    With the same seed, shuffled prompts are the others with their labels shuffled: the same examples in the same order,
    and the same question, but no input keeps its output (where outputs differ). Brown et al. 2020, Language Models are
    Few-Shot Learners, arXiv 2005.14165; shuffled labels as the corruption: Todd et al. 2023, Function Vectors in Large
    Language Models, arXiv 2310.15213.

    Args:
        pairs: the examples: (input, output) pairs, or a dict.
        count: how many prompts; None for one for each question.
        shots: how many examples each prompt shows; 0 asks without any (zero-shot).
        queries: the pairs that are asked; None for those of the examples. The word asked is never among its examples.
        template: how they are written: a name (``"arrow"``, ``"colon"``, ``"questions"``, ``"words"``) or a `Template`.
        shuffled: show the outputs of other inputs.
        seed: the same seed gives the same prompts.

    Raises:
        TypeError: no pairs, no template, no switch.
        ValueError: there are too few pairs for so many examples, or too few examples to shuffle; no such template.
    """
    shown = word_pairs(pairs)
    asked = shown if queries is None else word_pairs(queries, "queries")
    form = template_of(template)
    check_count(shots, "shots", 0)
    if count is not None:
        check_count(count, "count", 1)
    check_switch("shuffled", shuffled)
    check_seed(seed)
    least = shots + any(word in dict(shown) for word, _ in asked)
    if len(shown) < least and shots:
        raise ValueError(f"{len(shown)} pairs are too few for {shots} examples and a word that is none of them.")
    if shuffled and shots < 2:
        raise ValueError(f"shuffled labels need at least 2 examples, not shots={shots}.")
    draw, mix = random.Random(f"{seed} examples"), random.Random(f"{seed} labels")
    order: list[WordPair] = []
    while count is not None and len(order) < count:
        order += draw.sample(asked, len(asked))
    prompts = []
    for word, output in asked if count is None else order[:count]:
        examples = draw.sample([pair for pair in shown if pair[0] != word], shots)
        if shuffled:
            examples = _mixed(examples, mix)
        prompts.append(
            InContextPrompt(form.prompt(examples, word), form.gap + output, word, tuple(examples), bool(shuffled))
        )
    return prompts


def _mixed(examples: list[WordPair], mix: random.Random) -> list[WordPair]:
    """The same inputs, each with the output of another, where there is another."""
    outputs = [output for _, output in examples]
    best = outputs
    for _ in range(200):
        tried = mix.sample(outputs, len(outputs))
        if _kept(tried, outputs) < _kept(best, outputs):
            best = tried
        if not _kept(best, outputs):
            break
    return [(word, output) for (word, _), output in zip(examples, best, strict=True)]


def _kept(a: Sequence[str], b: Sequence[str]) -> int:
    return sum(x == y for x, y in zip(a, b, strict=True))


def in_context_prompts(given: Any, what: str = "prompts") -> list[InContextPrompt]:
    """Refuse what are no prompts of `in_context`.

    Raises:
        TypeError: they are none.
        ValueError: there are none.
    """
    listed = list(given) if isinstance(given, (list, tuple)) else [given]
    if any(not isinstance(one, InContextPrompt) for one in listed):
        wrong = next(one for one in listed if not isinstance(one, InContextPrompt))
        raise TypeError(f"{what} are a list of prompts as in_context makes them, not {wrong!r:.80}.")
    if not listed:
        raise ValueError(f"{what} are empty: give at least one, as in_context makes them.")
    return listed
