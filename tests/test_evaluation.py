"""An evaluation's numbers, one by one, against plain forwards, NumPy and counting by hand; and the report it makes."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from test_divergence import PAIRS, V, W, add, at_last, everywhere, plain_kl, preference, run
from test_extraction import ids, tokenizer

from mlxsteer import (
    ContrastPair,
    Evaluation,
    InterpretableModel,
    PairSet,
    SteeringVector,
    UnknownKey,
    evaluate,
    extract,
)
from mlxsteer import evaluation as evaluation_room
from mlxsteer import interventions as iv
from mlxsteer.measures import bootstrap
from mlxsteer.measures.preference import Preferences
from mlxsteer.measures.text import TextStatistics
from mlxsteer.pairs import PAIR_HASHES

NEUTRAL = ["the food was", "a", "rain <script>alert(1)</script> & so", "we go."]
EDITS = [add(1, -1, at_last, 2.0), add(3, "all", everywhere, -1.0)]
STEERING = {edit.key: edit.intervention for edit in EDITS}
QUESTIONS = [
    ContrastPair(prompt, *sides)
    for prompt in ("is it", "so we", "a day")
    for sides in ((" yes", " no"), (" no", " yes"), (" a", " bc"))
]
INSTRUCTION = "be good."
QUICK: dict[str, Any] = {"neutral": NEUTRAL, "tokens": 3, "max_tokens": 5, "nulls": 3, "progress": False, "seed": 4}


@pytest.fixture(scope="module")
def llama() -> InterpretableModel:
    return InterpretableModel(tiny.build("llama"), tokenizer())


@pytest.fixture(scope="module")
def found(llama: InterpretableModel) -> Evaluation:
    return evaluate(llama, STEERING, PAIRS, questions=QUESTIONS, instruction=INSTRUCTION, **QUICK)


def preferences(model: InterpretableModel, times: float, pairs: Any = PAIRS) -> np.ndarray:
    edits = [add(1, -1, at_last, 2.0 * times), add(3, "all", everywhere, -times)] if times else []
    return np.array([preference(model, pair, edits) for pair in pairs])


# -- the numbers -------------------------------------------------------------------------------------------------------


def test_effect_and_dose_response_are_those_of_plain_forwards(llama: InterpretableModel, found: Evaluation) -> None:
    multiples = [-1.0, -0.5, 0.0, 0.5, 1.0]
    curve = np.array([preferences(llama, times) for times in multiples])
    np.testing.assert_allclose(found.base, curve[2], atol=2e-4)
    np.testing.assert_allclose(found.steered, curve[4], atol=2e-4)
    shift = curve[4] - curve[2]
    assert np.abs(shift).max() > 0.1
    assert found.shift.value == pytest.approx(shift.mean(), abs=2e-4)
    assert found.shift.low < shift.mean() < found.shift.high
    slopes = [np.polyfit(multiples, column, 1)[0] for column in curve.T]
    np.testing.assert_allclose(found.curve.slopes, slopes, atol=5e-4)
    np.testing.assert_allclose(found.curve.mean_curve, curve.mean(1), atol=2e-4)
    assert found.curve.strengths.tolist() == multiples
    assert found.curve.anti_steerable == np.mean(np.array(slopes) < 0)


def test_divergence_is_that_of_plain_forwards(llama: InterpretableModel, found: Evaluation) -> None:
    each = plain_kl(llama, [llama.encode(prompt) for prompt in NEUTRAL], EDITS, 3)
    told = (found.divergence.mean, found.divergence.p50, found.divergence.p95, found.divergence.largest)
    assert told == pytest.approx(
        (each.mean(), np.median(each), np.quantile(each, 0.95), each.max()), rel=2e-3, abs=5e-6
    )
    assert found.divergence.tokens == 3 * len(NEUTRAL)


def perplexity(model: InterpretableModel, texts: list[Any]) -> float:
    each = []
    for one in texts:
        tokens = [*one.prompt_tokens, *one.tokens]
        logp = run(model, tokens, len(one.prompt_tokens))
        each += [logp[p - 1, tokens[p]] for p in range(len(one.prompt_tokens), len(tokens))]
    return float(np.exp(-np.mean(each)))


def statistics(texts: list[list[int]]) -> TextStatistics:
    """Counted by hand."""

    def repeat(t: list[int]) -> int:
        spans = [(i, j, n) for n in range(1, len(t)) for i in range(len(t) - n) for j in range(i + 1, len(t) - n + 1)]
        return max((n for i, j, n in spans if t[i : i + n] == t[j : j + n]), default=0)

    shares = [np.array(list(Counter(t).values())) / len(t) for t in texts]
    return TextStatistics(
        float(np.mean([len(set(t)) / len(t) for t in texts])),
        float(np.mean([len(set(pairwise(t))) / (len(t) - 1) for t in texts])),
        float(np.mean([repeat(t) for t in texts])),
        float(np.mean([-(p * np.log(p)).sum() for p in shares])),
        float(np.mean([len(t) for t in texts])),
    )


def test_texts_are_sampled_with_one_seed_and_judged_unsteered(llama: InterpretableModel, found: Evaluation) -> None:
    sampled: dict[str, Any] = {"max_tokens": 5, "temp": 1.0, "seed": 4}
    own, steered = llama.generate(NEUTRAL, **sampled), llama.generate(NEUTRAL, STEERING, **sampled)
    assert found.perplexity_ratio == pytest.approx(perplexity(llama, steered) / perplexity(llama, own), rel=1e-4)
    assert found.perplexity_ratio != 1
    for told, texts in ((found.own_text, own), (found.steered_text, steered)):
        counted = statistics([one.tokens for one in texts])
        for name in ("distinct_1", "distinct_2", "longest_repeat", "entropy", "length"):
            assert getattr(told, name) == pytest.approx(getattr(counted, name)), name
    assert found.samples == tuple((p, str(a), str(b)) for p, a, b in zip(NEUTRAL, own, steered, strict=True))


def pushed(edit: Any, x: mx.array) -> mx.array:
    return x + edit.strength * edit.vector


def test_nulls_are_random_vectors_of_the_same_lengths(
    llama: InterpretableModel, found: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    under = Preferences.under
    monkeypatch.setattr(Preferences, "under", lambda self, edits: seen.append(edits) or under(self, edits))  # type: ignore[func-returns-value]
    again = evaluate(llama, STEERING, PAIRS, **QUICK)
    assert again.nulls == found.nulls
    drawn = seen[4:]  # behind the four doses
    assert len(drawn) == len(found.nulls) == 3
    vectors = []
    for edits, null in zip(drawn, found.nulls, strict=True):
        assert [site.key for site, _ in edits] == ["layers.1", "layers.3"]
        for (_, edit), own in zip(edits, EDITS, strict=True):
            assert (edit.strength, edit.at) == (own.intervention.strength, own.intervention.at)
            assert mx.linalg.norm(edit.vector).item() == pytest.approx(mx.linalg.norm(V).item(), rel=1e-5)
            vectors.append(np.array(edit.vector) / np.linalg.norm(np.array(edit.vector)))
        changes = [replace(one, change=partial(pushed, edit)) for one, (_, edit) in zip(EDITS, edits, strict=True)]
        moved = [preference(llama, pair, changes) - preference(llama, pair) for pair in PAIRS]
        assert null == pytest.approx(np.mean(moved), abs=2e-4)
    cosines = np.array(vectors) @ np.array(vectors).T - np.eye(6)
    assert np.abs(cosines).max() < 0.6
    assert found.p_value == (1 + sum(null >= found.shift.value for null in found.nulls)) / 4


@pytest.mark.parametrize(
    ("steering", "where"),
    [
        ({"layers.1": iv.ablate(W)}, "layers.1 (ablate)"),
        ({"layers.1": iv.add_vector(V), "layers.2": iv.scale(1.1)}, "layers.2 (scale)"),
        ({"layers.1": [iv.add_vector(V), iv.add_vector(W)]}, "layers.1 (compose)"),
        ({"layers.1": iv.add_sequence(V[None]), "logits": lambda x: x}, "layers.1 (add_sequence), logits (function)"),
    ],
    ids=["ablation", "an addition and a scale", "two additions", "a sequence and a function"],
)
def test_only_additions_have_nulls_and_others_say_why(
    llama: InterpretableModel, steering: dict[str, Any], where: str
) -> None:
    one = evaluate(llama, steering, PAIRS[:2], **QUICK)
    assert one.nulls == ()
    assert np.isnan(one.p_value)
    data = json.loads(one.to_json(), parse_constant=no_constant)
    assert (data["p_value"], data["nulls"], data["instruction"], data["accuracy"]) == (None, [], None, None)
    assert "retention" not in one.table()
    said = f"random vectors stand in for add_vector alone, and something else is done at {where}"
    assert f"what chance would do is unknown: {said}." in one.warnings
    assert ("random vectors", "none drawn", said) in one.rows()
    none = replace(one, record={**one.record, "no_nulls_for": None})  # as with nulls=0
    assert ("random vectors", "none drawn", "none were asked for") in none.rows()
    assert not [warning for warning in none.warnings if "chance" in warning]


def test_an_instruction_is_the_prompt_in_place_of_the_steering(llama: InterpretableModel, found: Evaluation) -> None:
    told = [preference(llama, replace(p, prompt=f"{INSTRUCTION} {p.prompt}".rstrip())) for p in PAIRS]
    base, steered = preferences(llama, 0), preferences(llama, 1)
    assert found.instruction is not None
    assert found.over_instruction is not None
    assert found.instruction.value == pytest.approx(np.mean(told - base), abs=2e-4)
    assert found.over_instruction.value == pytest.approx(np.mean(steered - told), abs=2e-4)
    assert abs(found.instruction.value) > 1e-3


def test_a_chat_is_instructed_by_a_system_message(pocket: InterpretableModel) -> None:
    asked = {"role": "user", "content": "Hello!"}
    said = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Yes."}, asked]
    pairs = [ContrastPair("Hello!", "Good.", "Bad.", chat=True), ContrastPair("", "Yes.", "No.", messages=tuple(said))]
    quick: dict[str, Any] = {"neutral": ["Go."], "tokens": 1, "max_tokens": 2, "nulls": 0, "progress": False}
    steering = {"layers.5": iv.add_vector(mx.ones(256), 0.3, at=-1)}
    one = evaluate(pocket, steering, pairs, instruction="Be kind.", **quick)
    system = {"role": "system", "content": "Be kind."}

    def plain(messages: list[dict[str, str]], pair: ContrastPair) -> float:
        prompt, sums = pocket.encode(messages), []
        assert pocket.tokenizer is not None
        for side in (pair.positive, pair.negative):
            tokens = prompt + pocket.tokenizer.encode(side, add_special_tokens=False)
            logp = run(pocket, tokens, len(prompt))
            sums.append(sum(logp[p - 1, tokens[p]] for p in range(len(prompt), len(tokens))))
        return float(sums[0] - sums[1])

    conversations = [([asked], pairs[0]), (said, pairs[1])]
    base = np.array([plain(messages, pair) for messages, pair in conversations])
    told = np.array([plain([system, *messages], pair) for messages, pair in conversations])
    np.testing.assert_allclose(one.base, base, atol=5e-3)
    assert one.instruction is not None
    assert one.instruction.value == pytest.approx((told - base).mean(), abs=5e-3)
    assert abs((told - base).mean()) > 0.02
    as_chat = evaluate(pocket, steering, [replace(pairs[0], chat=False), pairs[1]], instruction="Be kind.", chat=True,
                       **quick)  # fmt: skip
    assert as_chat.instruction == one.instruction
    assert as_chat.divergence != one.divergence  # neutral prompts are messages too
    assert as_chat.samples[0][0] == "Go."


@pytest.mark.parametrize("role", ["system", "developer"])
def test_an_instruction_joins_the_system_message_that_is_there(pocket: InterpretableModel, role: str) -> None:
    system, asked = {"role": role, "content": "You are warm.\n"}, {"role": "user", "content": "Hello!"}
    both = {"role": role, "content": "You are warm.\n\nBe kind."}
    given = [ContrastPair("", "Good.", "Bad.", messages=(system, asked))]
    seen = evaluation_room._instructed(pocket, given, "Be kind.", False)
    empty = replace(given[0], messages=({"role": role, "content": ""}, asked))
    seen += evaluation_room._instructed(pocket, [empty], "Be kind.", True)
    assert [pair.messages for pair in seen] == [(both, asked), ({"role": role, "content": "Be kind."}, asked)]
    assert given[0].messages == (system, asked)


def test_a_template_without_system_messages_is_instructed_by_the_user(
    pocket: InterpretableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = pocket.tokenizer
    assert tokenizer is not None
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", refusing + str(tokenizer.chat_template))
    asked = {"role": "user", "content": "Hello!"}
    given = [ContrastPair("Hello!", "Good.", "Bad.", chat=True)]
    (told,) = evaluation_room._instructed(pocket, given, "Be kind.", False)
    assert told.messages == ({"role": "user", "content": "Be kind.\n\nHello!"},)
    with pytest.raises(ValueError, match="chat template refuses messages by system, user: no system role"):
        pocket.encode([{"role": "system", "content": "x"}, asked])
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", "{{ raise_exception('none at all') }}")
    monkeypatch.setattr(evaluation_room, "Preferences", None)  # refused before anything runs
    with pytest.raises(ValueError, match="refuses messages by user: none at all"):
        evaluate(pocket, {"layers.5": iv.add_vector(mx.ones(256))}, given * 2, instruction="Be kind.", neutral=["Go."])


def test_a_vector_that_has_seen_the_pairs_is_found_out(llama: InterpretableModel) -> None:
    quick: dict[str, Any] = {**QUICK, "nulls": 0, "neutral": NEUTRAL[:1], "max_tokens": 1}
    said = f"the vector was computed from 2 of the {len(PAIRS)} pairs: what it does on them looks better than it is."
    vector = extract(llama, [*PAIRS[:2], ContrastPair("so", " yes", " no")], progress=False)
    steering = vector.at(1, 1.0)
    told = evaluate(llama, steering, PAIRS, vector=vector, **quick)
    assert said in told.warnings
    assert told.record["pairs_seen"] == 2
    assert f"Warning: {said}" in " ".join(told.table().split())
    assert evaluate(llama, {"layers.2": iv.add_vector(V)}, PAIRS, **quick).record["pairs_seen"] == "unknown"
    steering["layers.1"]._cache[PAIR_HASHES] = vector.info[PAIR_HASHES]  # as of a choice
    known = evaluate(llama, {"layers.1": [steering["layers.1"], iv.scale(1.1)]}, PAIRS[1:], **quick)
    assert known.record["pairs_seen"] == 1
    with pytest.raises(TypeError, match="vector is a SteeringVector, not dict"):
        evaluate(llama, steering, PAIRS, vector=steering, **quick)  # type: ignore[arg-type]


def test_questions_say_what_is_left_of_an_ability(llama: InterpretableModel, found: Evaluation) -> None:
    right = [(preferences(llama, times, QUESTIONS) > 0).mean() for times in (0, 1)]
    assert found.accuracy == pytest.approx(tuple(right))
    assert 0 < right[0] < 1
    assert found.retention == pytest.approx(right[1] / right[0])
    assert f"accuracy on two options {right[1]:.0%}, unsteered {right[0]:.0%}" in " ".join(found.table().split())
    wrong = [pair for pair in QUESTIONS if preference(llama, pair) < 0]
    none = evaluate(llama, STEERING, PAIRS[:2], questions=wrong, **QUICK)
    assert none.accuracy is not None
    assert (none.retention, none.accuracy[0]) == (None, 0.0)
    assert "unsteered 0%" in " ".join(none.table().split())
    assert json.loads(none.to_json(), parse_constant=no_constant)["retention"] is None


def test_held_out_pairs_are_the_report_split(llama: InterpretableModel, found: Evaluation) -> None:
    others = [
        ContrastPair("no one", " is", " was", split="train"),
        ContrastPair("all", " of it", " of us", split="choose"),
    ]
    split = PairSet([*others, *(replace(pair, split="report") for pair in PAIRS)], name="mine")
    again = evaluate(llama, STEERING, split, **QUICK)
    np.testing.assert_array_equal(again.base, found.base)
    assert again.shift == found.shift
    assert again.record["pairs"] == len(PAIRS)
    assert again.record["data"] == split.fingerprint != found.record["data"]


def test_the_record_says_what_was_done(found: Evaluation) -> None:
    record = found.record
    assert record["interventions"].startswith("layers.1: AddVector(vector=<64>, strength=2.0")
    assert (record["model"], record["seed"], record["tokens"], record["max_tokens"]) == ("llama", 4, 3, 5)
    assert (record["neutral_prompts"], record["instruction"]) == (4, INSTRUCTION)
    assert {"mlxsteer", "mlx", "mlx_lm", "data", "neutral"} <= set(record)


def test_progress_is_told(llama: InterpretableModel) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(llama, {"layers.1": iv.scale(1.1)}, PAIRS[:2],
             **{**QUICK, "progress": lambda done, total: seen.append((done, total))})  # fmt: skip
    assert seen == [(i, 5) for i in range(6)]


# -- the report --------------------------------------------------------------------------------------------------------


def no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


class Page(HTMLParser):
    """Tags, their attributes, and the text outside of style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_stands_alone_and_escapes_what_it_shows(found: Evaluation, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(2)>"
    samples = (*found.samples[:3], ("we go.", evil, "</td></table><script>"))
    record = {**found.record, "model": f"a & b {evil}", "instruction": "<b>be good</b>"}
    path = replace(found, samples=samples, record=record).to_html(tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert page.tags.count("img") == 1
    sources = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,iVBORw0KGgo")
    assert not re.search(r"https?:|url\(|@import|//[a-z]", text.replace(sources[0], ""))
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for said in (NEUTRAL[2], evil, "</td></table><script>", "<b>be good</b>", "a & b"):
        assert said in page.text, said
    for name, value, _ in found.rows():
        assert name in page.text
        assert value in page.text
    assert f"{found.divergence.mean:.3g} nats a token" in " ".join(page.text.split())
    assert f"{max(found.nulls):+.2f} nats (p = {found.p_value:.3f})" in page.text
    with pytest.raises(ValueError, match=r"written as \.html"):
        found.to_html(tmp_path / "report.pdf")


def test_a_page_of_an_evaluation_without_extras(llama: InterpretableModel, tmp_path: Path) -> None:
    one = evaluate(llama, {"layers.1": iv.scale(1.1)}, PAIRS[:2], **QUICK)
    text = one.to_html(tmp_path / "a.html").read_text(encoding="utf-8")
    assert "Random vectors" not in text
    assert "nan" not in Page(text).text.lower().replace("distinct", "")


def test_a_table_and_json_hold_everything(found: Evaluation, tmp_path: Path) -> None:
    table = found.table()
    for said in ("shift", "instruction", "beyond it", "KL, mean", "perplexity ratio", "retention", "longest repeat"):
        assert said in table, said
    assert "NaN" not in table
    text = found.to_json(tmp_path / "found.json")
    assert (tmp_path / "found.json").read_text(encoding="utf-8") == text
    data = json.loads(text, parse_constant=no_constant)
    assert data["shift"]["value"] == found.shift.value
    assert data["base"] == found.base.tolist()
    assert data["steered"] == found.steered.tolist()
    assert data["nulls"] == list(found.nulls)
    assert data["mean_curve"] == found.curve.mean_curve.tolist()
    for one, row in zip(data["changes"], found.curve.effect, strict=True):
        change = bootstrap(row - found.base)
        assert (one["value"], one["low"], one["high"]) == (change.value, change.low, change.high)
    assert data["divergence"]["p95"] == found.divergence.p95
    assert data["accuracy"] == list(found.accuracy or ())
    assert data["samples"][2][0] == NEUTRAL[2]
    broken = replace(found, p_value=float("nan"), perplexity_ratio=float("inf"), record={"x": [float("nan")]})
    data = json.loads(broken.to_json(), parse_constant=no_constant)
    assert (data["p_value"], data["perplexity_ratio"], data["record"]) == (None, None, {"x": [None]})
    assert repr(found).startswith(f"Evaluation(shift {found.shift} nats, KL ")


def assert_banded(band: Any, strength: float, steered: np.ndarray, base: np.ndarray) -> None:
    """The band ends where the paired interval of the change does, about the mean."""
    corners = band.get_paths()[0].vertices
    heights = corners[np.isclose(corners[:, 0], strength), 1]
    change = bootstrap(steered - base)
    expected = base.mean() + np.array([change.low, change.high])
    np.testing.assert_allclose([heights.min(), heights.max()], expected, atol=1e-9)


def test_the_picture_shows_the_numbers(found: Evaluation, tmp_path: Path) -> None:
    figure = found.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    dose, pairs, text = figure.axes
    np.testing.assert_allclose(dose.lines[1].get_ydata(), found.curve.mean_curve)
    np.testing.assert_allclose(dose.lines[2].get_ydata(), found.base.mean() + np.array(found.nulls), atol=1e-9)
    assert_banded(dose.collections[0], 1.0, found.steered, found.base)
    assert_banded(dose.collections[0], 0.0, found.base, found.base)
    order = np.argsort(found.base)
    np.testing.assert_array_equal(pairs.lines[1].get_ydata(), found.base[order])
    np.testing.assert_array_equal(pairs.lines[2].get_ydata(), found.steered[order])
    assert [label.get_text() for label in text.get_yticklabels()][:2] == ["perplexity", "distinct 1"]
    widths = [bar.get_width() for bar in text.patches]
    assert widths[0] == pytest.approx(found.perplexity_ratio - 1)
    assert widths[1] == pytest.approx(found.steered_text.distinct_1 / found.own_text.distinct_1 - 1)
    with pytest.raises(ValueError, match=r"\.png, \.pdf or \.svg"):
        found.plot(tmp_path / "a.html")
    empty = TextStatistics(float("nan"), float("nan"), 0.0, float("nan"), 0.0)
    replace(found, own_text=empty, nulls=()).plot(tmp_path / "b.svg")


# -- what goes in ------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a vector": ({"interventions": SteeringVector({1: mx.ones(64)})}, TypeError, "says where and how strongly"),
    "nothing": ({"interventions": {}}, ValueError, "would do nothing"),
    "a key": ({"interventions": {"layers.9": iv.add_vector(V)}}, UnknownKey, "layers"),
    "no pairs": ({"pairs": []}, ValueError, "no contrast pairs"),
    "one pair": ({"pairs": PAIRS[:1]}, ValueError, "an interval needs 2 pairs or more"),
    "texts": ({"pairs": ["a"]}, TypeError, "contrast pairs are a list of ContrastPair"),
    "one prompt": ({"neutral": "the food"}, TypeError, r"one prompt is \[prompt\]"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "kind", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_evaluated_is_refused_before_anything_runs(
    llama: InterpretableModel, given: dict[str, Any], kind: type[Exception], sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(type(llama.model), "__call__", lambda *_, **__: pytest.fail("it ran"))
    arguments = {"interventions": STEERING, "pairs": PAIRS, **QUICK, **given}
    with pytest.raises(kind, match=sentence):
        evaluate(llama, arguments.pop("interventions"), arguments.pop("pairs"), **arguments)


def test_no_neutral_prompts_are_refused(llama: InterpretableModel) -> None:
    with pytest.raises(ValueError, match="no neutral prompts"):
        evaluate(llama, STEERING, PAIRS[:2], **{**QUICK, "neutral": [], "nulls": 0})


def test_prompts_may_be_token_ids(llama: InterpretableModel, found: Evaluation) -> None:
    again = evaluate(llama, STEERING, PAIRS[:2], **{**QUICK, "neutral": [ids("the food was"), ids("a")], "nulls": 0})
    texts = evaluate(llama, STEERING, PAIRS[:2], **{**QUICK, "neutral": ["the food was", "a"], "nulls": 0})
    assert again.divergence == texts.divergence
    assert again.perplexity_ratio == texts.perplexity_ratio
