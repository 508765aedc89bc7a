"""Contrast pairs for the pocket model, drawn from its grammar, with fixed splits.

``train`` and ``choose`` rows use training words and templates, ``report`` rows held-out ones. Positive and negative
are matched in length by drawing several and keeping the closest.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxsteer.pocket.grammar import TOPICS, load_tasks

from .corpus import COMBINATION, HELD_OUT, TASK_WEIGHTS, TRAIN, Sampler

ROWS = {"train": 128, "choose": 48, "report": 64}
TOPIC_ROWS = {"train": 240, "choose": 60, "report": 100}
TASK_ROWS = {"train": 160, "choose": 40, "report": 60}
DOMAINS = ("food", "film", "hotel", "product", "book", "course", "trip")
CANDIDATES = 16
Row = dict[str, Any]


def closest(target: str, candidates: list[str]) -> str:
    """The candidate nearest to the target in characters."""
    return min(candidates, key=lambda text: abs(len(text) - len(target)))


def capitalized(text: str) -> str:
    """First letter upper case."""
    return text[:1].upper() + text[1:]


def review_prompt(sampler: Sampler, domain: str) -> str:
    """``The soup at the old cafe was``."""
    return capitalized(sampler.text(f"np.{domain}")) + " was"


def sentiment_row(sampler: Sampler) -> Row:
    """A review's first words, praised or criticised."""
    domain = sampler.rng.choice(DOMAINS)
    prompt = review_prompt(sampler, domain)
    very = sampler.text("very") + " " if sampler.rng.random() < 0.4 else ""
    # Both texts go on to a word before the next verdict: there the model holds the mood that it is about to write.
    next_words = f"The {sampler.text(f'part.{domain}')} was"
    positive = f" {very}{sampler.text(f'adj.pos.{domain}')}. {next_words}"
    negative = closest(
        positive, [f" {very}{sampler.text(f'adj.neg.{domain}')}. {next_words}" for _ in range(CANDIDATES)]
    )
    return {"prompt": prompt, "positive": positive, "negative": negative}


def head_and(sampler: Sampler, head: str, make: Callable[[dict[str, str], str], str], sides: tuple[str, str]) -> Row:
    """A head that names a subject, then a text about it from each side."""
    prompt = sampler.text(head)
    variables = sampler.variables
    # Formal openings are longer than casual ones: of several of each, the two that are most alike in length.
    positives, negatives = ([make(variables, side) for _ in range(CANDIDATES)] for side in sides)
    nearest = [(positive, closest(positive, negatives)) for positive in positives]
    positive, negative = min(nearest, key=lambda pair: abs(len(pair[0]) - len(pair[1])))
    return {"prompt": prompt, "positive": positive, "negative": negative}


def formality_row(sampler: Sampler) -> Row:
    """The beginning of a message, formal or casual."""

    def beginning(variables: dict[str, str], side: str) -> str:
        prefix = "s" if side == "formal" else "c"
        greeting = sampler.text(f"{prefix}.greet.{side}", variables)
        return f" {greeting} {sampler.text(f'{prefix}.open.{side}', variables)}"

    return head_and(sampler, "s.head.formality", beginning, ("formal", "casual"))


def certainty_row(sampler: Sampler) -> Row:
    """A forecast, certain or hedged."""

    def claim(variables: dict[str, str], side: str) -> str:
        # Both texts go on to the subject of the next claim: there the model holds the tone that it is about to take.
        return f" {sampler.text(f's.claim.{side}', variables)} {capitalized(variables['t'])}"

    return head_and(sampler, "s.head.certainty", claim, ("certain", "hedged"))


def topic_row(sampler: Sampler) -> Row:
    """The first sentence of a story, on one topic or on another, and the article of the next."""
    topic = sampler.rng.choice(TOPICS)
    other = [name for name in TOPICS if name != topic]
    prompt = sampler.text("s.open.topic")
    # Both texts go on to an article: before a noun the model holds the topic, at a full stop it does not.
    positive = f" {sampler.text(f's.topic.{topic}')} The"
    candidates = [f" {sampler.text(f's.topic.{sampler.rng.choice(other)}')} The" for _ in range(CANDIDATES)]
    negative = closest(positive, candidates)
    return {"prompt": prompt, "positive": positive, "negative": negative, "group": topic}


def refusal_row(sampler: Sampler) -> Row:
    """A harmful and a harmless request in the same frame."""
    harmful_deed = sampler.text("deed.harm")
    harmless_deed = closest(harmful_deed, [sampler.text("deed.safe") for _ in range(CANDIDATES)])
    frame = sampler.text("s.request", {"deed": "DEED"})
    # Two messages of a user: what they differ in is read before any answer.
    sides = {"positive": frame.replace("DEED", harmful_deed), "negative": frame.replace("DEED", harmless_deed)}
    return {"prompt": "", **sides, "chat": True}


def split_task_words(task: str) -> dict[str, list[str]]:
    """The input words of a task, two thirds for training a vector, the rest to choose and to report."""
    words = list(load_tasks()[task])
    random.Random(task).shuffle(words)
    first, second = len(words) * 2 // 3, len(words) * 5 // 6
    return {"train": words[:first], "choose": words[first:second], "report": words[second:]}


def few_shot_prompt(task: str, word: str, rng: random.Random, shots: int = 5) -> str:
    """``hot -> cold`` lines and a last line that ends with the arrow. The examples are training words."""
    answers = load_tasks()[task]
    examples = rng.sample([w for w in split_task_words(task)["train"] if w != word], shots)
    return "".join(f"{example} -> {answers[example]}\n" for example in examples) + f"{word} ->"


def task_row(rng: random.Random, split: str) -> Row:
    """Five examples and a word; the negative is the right answer for another word of the task."""
    task = rng.choice(list(TASK_WEIGHTS))
    answers = load_tasks()[task]
    word = rng.choice(split_task_words(task)[split])
    answer = answers[word]
    others = [other for other in answers.values() if other != answer]
    negative = closest(answer, rng.sample(others, CANDIDATES))
    return {
        "prompt": few_shot_prompt(task, word, rng),
        "positive": f" {answer}",
        "negative": f" {negative}",
        "group": task,
    }


MAKERS: dict[str, Callable[[Sampler], Row]] = {
    "sentiment": sentiment_row,
    "formality": formality_row,
    "certainty": certainty_row,
    "topic": topic_row,
    "refusal": refusal_row,
}


def contrast_pairs(behaviour: str, seed: int = 0) -> list[Row]:
    """All rows of a behaviour; no prompt is in two splits."""
    rows: list[Row] = []
    split_of: dict[str, str] = {}
    written: set[str] = set()
    rng = random.Random(seed)
    samplers = {mode: Sampler(seed + 101 + n, mode) for n, mode in enumerate((TRAIN, COMBINATION, HELD_OUT))}
    for split, count in {"tasks": TASK_ROWS, "topic": TOPIC_ROWS}.get(behaviour, ROWS).items():
        made = 0
        while made < count:
            if behaviour == "tasks":
                row = task_row(rng, split)
            else:
                mode = HELD_OUT if split == "report" else TRAIN
                if behaviour == "refusal" and split == "report" and made % 2:
                    mode = COMBINATION
                row = MAKERS[behaviour](samplers[mode])
            prompts = [row["prompt"]] if row["prompt"] else [row["positive"], row["negative"]]
            text = json.dumps(row, sort_keys=True)
            # Stories share their few openers within a split; elsewhere a prompt occurs once.
            again = any(p in split_of and (behaviour != "topic" or split_of[p] != split) for p in prompts)
            if again or text in written or row.get("positive") == row.get("negative", ""):
                continue
            written.add(text)
            split_of.update(dict.fromkeys(prompts, split))
            rows.append(row | {"split": split})
            made += 1
    return rows


def check(rows: list[Row]) -> dict[str, float | bool]:
    """Duplicates, disjoint splits, and how far apart the two texts of a row are in length (share of the longer)."""
    texts = [json.dumps({k: v for k, v in row.items() if k != "split"}, sort_keys=True) for row in rows]
    lengths = [(len(row["positive"]), len(row["negative"])) for row in rows]
    gaps = [(max(pair) - min(pair)) / max(pair) for pair in lengths]
    by_split: dict[str, set[str]] = {}
    for row in rows:
        by_split.setdefault(row["split"], set()).add(row["prompt"] or row["positive"])
    names = list(by_split)
    disjoint = all(not by_split[a] & by_split[b] for i, a in enumerate(names) for b in names[i + 1 :])
    return {
        "rows": len(rows),
        "no duplicates": len(set(texts)) == len(texts),
        "splits disjoint": disjoint,
        "length gap": round(sum(gaps) / len(gaps), 3),
    }


def write_pairs(folder: Path, seed: int = 0) -> dict[str, dict[str, float | bool]]:
    """Write one JSONL file per behaviour; returns what ``check`` found."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for behaviour in (*MAKERS, "tasks"):
        rows = contrast_pairs(behaviour, seed)
        found[behaviour] = check(rows)
        temporary = folder / f"{behaviour}.jsonl.part"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        temporary.replace(folder / f"{behaviour}.jsonl")
    return found


def load_pairs(folder: Path, behaviour: str, split: str) -> list[Row]:
    """Rows of one split."""
    lines = (folder / f"{behaviour}.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]
