"""The scorer accepts what the grammar generates, rejects damaged texts, and knows the sides."""

import random

import pytest

from mlxsteer.pocket import scorer
from mlxsteer.pocket.grammar import SIDES, TOPICS, load_rules
from training.corpus import HELD_OUT, TRAIN, Sampler

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


def test_may_is_a_month_where_it_has_a_capital():
    assert scorer.counts("certainty", " It will certainly open in May.") == {"certain": 1, "hedged": 0}
    assert scorer.counts("certainty", " It may certainly open.") == {"certain": 1, "hedged": 1}


def test_a_judge_gives_one_number():
    polite = scorer.judge("formality")
    assert [polite(text) for text in (" Dear Mr. Hall, I am writing to you.", " hey u!", " The tea.")] == [1, 0, 0.5]
    assert scorer.judge("refusal")("I'm sorry, but I can't help with that.") == 1
    assert scorer.judge("refusal")("Sure, here is a simple plan.") == 0
    assert [
        scorer.judge("farm")(f" The rural farmer plowed the field. {rest}") for rest in ("", "The whale dived. " * 3)
    ] == [1, 0]
    with pytest.raises(ValueError, match=r"no judge of 'sentimnt'\. Nearest: sentiment"):
        scorer.judge("sentimnt")


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


@pytest.mark.parametrize("kind", ["sentiment", "formality", "certainty", "topic"])
def test_no_held_out_word_or_template_is_in_a_training_text(kind):
    alternatives = [a for rule in load_rules().values() for a in rule.alternatives]
    longest = [max((part for part in a.parts if isinstance(part, str)), key=len, default="") for a in alternatives]
    trained = {text.strip() for a, text in zip(alternatives, longest, strict=True) if not a.held_out}
    held_out = {text.strip() for a, text in zip(alternatives, longest, strict=True) if a.held_out} - trained
    held_out = {
        text for text in held_out if not any(text in other for other in trained) and (" " not in text or len(text) > 12)
    }
    assert len(held_out) > 50
    pattern, training, fresh = scorer.word_pattern(held_out), Sampler(8, TRAIN), Sampler(8, HELD_OUT)
    for _ in range(300):
        text = training.draw(kind)
        assert not pattern.search(text), text
    assert sum(bool(pattern.search(fresh.draw(kind))) for _ in range(50)) >= 25


def test_long_texts_take_no_forever_and_wrong_ones_are_refused_in_words():
    assert scorer.grammatical("-" * 100_000 + "!x ") is False
    assert scorer.refused("I can’t help with that.")
    assert scorer.refused("<|user|>How do I bake bread?<|end|><|assistant|>I can't help with that.<|end|>")
    assert scorer.score("topic", " The whale dived.").share is None
    with pytest.raises(ValueError, match="'topic' has no two sides. There are sentiment"):
        scorer.share("topic", "The ship sailed")
    with pytest.raises(ValueError, match="no topic 'oceans'. Nearest: ocean"):
        scorer.mentions("x", "oceans")
    for wrong in (None, b"x", ["a"]):
        for refuse in (scorer.refused, scorer.grammatical, scorer.judge("sentiment"), scorer.judge("refusal")):
            with pytest.raises(TypeError, match="a text is scored, not .*; of several, score each"):
                refuse(wrong)
