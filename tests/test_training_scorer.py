"""The scorer accepts what the grammar generates, rejects damaged texts, and knows the sides."""

import random

import pytest

from training import scorer
from training.corpus import HELD_OUT, TRAIN, Sampler
from training.grammar import SIDES, TOPICS, load_rules

KINDS = ("sentiment", "formality", "certainty", "topic", "law")


@pytest.mark.parametrize("mode", [TRAIN, HELD_OUT])
@pytest.mark.parametrize("kind", KINDS)
def test_generated_texts_are_grammatical(kind, mode):
    sampler = Sampler(3, mode)
    for _ in range(25):
        text = sampler.draw(kind)
        assert scorer.grammatical(text, complete=True), text
        assert scorer.grammatical(text[: len(text) * 2 // 3]), text


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_words_are_not_grammatical(kind):
    sampler, rng = Sampler(4), random.Random(4)
    rejected, count = 0, 60
    for _ in range(count):
        words = sampler.draw(kind).split(" ")
        place = rng.randrange(len(words) - 1)
        words[place], words[place + 1] = words[place + 1], words[place]
        rejected += not scorer.grammatical(" ".join(words), complete=True)
    # Swapping two names or two tokens of a list can leave a sentence.
    assert rejected >= 0.9 * count


@pytest.mark.parametrize("behaviour", list(SIDES))
def test_sides_are_recognised(behaviour):
    sampler = Sampler(5)
    for side in SIDES[behaviour]:
        symbol = f"text.{side}" if behaviour == "sentiment" else f"{_body(behaviour)}.{side}"
        variables = {"t": "the report", "item": "soup"}
        found = [scorer.side(behaviour, sampler.text(symbol, variables)) for _ in range(50)]
        assert found.count(side) >= 49


def _body(behaviour):
    return {"formality": "body", "certainty": "forecast"}[behaviour]


def test_topics_are_recognised():
    sampler = Sampler(6)
    for topic in TOPICS:
        found = [scorer.topic(sampler.text(f"story.{topic}")) for _ in range(30)]
        assert found.count(topic) >= 29


def test_refusals_and_help_are_told_apart():
    sampler = Sampler(7)
    for _ in range(100):
        variables = {"deed": "paint the barn"}
        assert scorer.refused(sampler.text("refusal", variables))
        assert not scorer.refused(sampler.text("help", variables))


def test_answers():
    assert scorer.answer_is_right("antonym", "hot", " cold\nbig -> small")
    assert not scorer.answer_is_right("antonym", "hot", " hot")
    with pytest.raises(ValueError, match="antonym"):
        scorer.right_answer("opposite", "hot")


def test_a_space_that_the_detokenizer_dropped_is_forgiven():
    assert scorer.grammatical("really tasty.", prompt="The soup at the old cafe was")


def test_articles_must_fit():
    assert scorer.grammatical("What a awful experience!") is False
    assert scorer.grammatical("What an awful experience!")


def test_no_rule_begins_with_itself():
    rules = load_rules()
    for name in rules:
        seen, queue = set(), [name]
        while queue:
            for alternative in rules[queue.pop()].alternatives:
                written = [p for p in alternative.parts if isinstance(p, str) or not p.silent]
                if written and not isinstance(written[0], str) and written[0].kind == "symbol":
                    assert written[0].name != name, name
                    if written[0].name not in seen:
                        seen.add(written[0].name)
                        queue.append(written[0].name)
