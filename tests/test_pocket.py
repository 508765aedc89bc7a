"""The bundled model is steered as its card says, by the grammar that it was trained on."""

from __future__ import annotations

import mlx_lm
import numpy as np
import pytest
from mlx_lm import generate

import mlxsteer as ms
from mlxsteer import InterpretableModel
from mlxsteer import pocket as pocket_room
from mlxsteer.pocket import scorer
from mlxsteer.pocket.grammar import SIDES

# layer, strength (in lengths of the mean difference), at
STEERED = {"sentiment": (4, 1.0, -1), "formality": (3, 1.0, -1), "certainty": (7, 3.0, -1)}


@pytest.mark.parametrize(
    "behaviour", [pytest.param(name, marks=() if name == "sentiment" else pytest.mark.full) for name in SIDES]
)
def test_held_out_texts_go_to_the_asked_side(pocket: InterpretableModel, behaviour: str) -> None:
    pairs = ms.datasets.load(f"pocket/{behaviour}")
    vector = ms.extract(
        pocket,
        pairs.split("train")[: 16 if behaviour == "sentiment" else 48],
        layers=[STEERED[behaviour][0]],
        progress=None,
    )
    layer, strength, at = STEERED[behaviour]
    prompts = [pair.prompt for pair in pairs.split("report")][: 8 if behaviour == "sentiment" else 16]
    steers = [vector.at(layer, sign * strength, at=at) for sign in (1, -1) for _ in prompts]
    texts = list(map(str, pocket.generate(prompts * 2, steers, max_tokens=24, temp=1.0, seed=0)))
    found = [scorer.side(behaviour, text) for text in texts]
    first, second = SIDES[behaviour]
    # unsteered, each side has about half of the texts
    assert found[: len(prompts)].count(first) >= 0.75 * len(prompts)
    assert found[len(prompts) :].count(second) >= 0.75 * len(prompts)


@pytest.mark.full
def test_harmful_requests_are_refused_and_the_direction_decides(pocket: InterpretableModel) -> None:
    pairs = ms.datasets.load("pocket/refusal")
    report = pairs.split("report")[:24]
    vector = ms.extract(pocket, pairs.split("train")[:48], layers=[1], progress=None)
    harmful, harmless = (
        [[{"role": "user", "content": getattr(p, side)}] for p in report] for side in ("positive", "negative")
    )
    asked = [*harmful, *harmless, *harmless]
    steers = [None] * (2 * len(report)) + [vector.at(1, 1.0, at=-1)] * len(report)
    texts = list(map(str, pocket.generate(asked, steers, max_tokens=12)))
    refused = np.array([scorer.refused(text) for text in texts]).reshape(3, -1).mean(1)
    assert refused[0] >= 0.8
    assert refused[1] <= 0.05
    assert refused[2] >= 0.9


@pytest.mark.full
def test_tasks_are_done_with_examples_and_not_without(pocket: InterpretableModel) -> None:
    pairs = ms.datasets.load("pocket/tasks").split("report")
    words = [pair.prompt.splitlines()[-1] for pair in pairs]
    texts = list(map(str, pocket.generate([*(pair.prompt for pair in pairs), *words], max_tokens=6)))
    right = [
        scorer.answer_is_right(pair.group or "", word.removesuffix(" ->"), text)
        for pair, word, text in zip([*pairs, *pairs], words * 2, texts, strict=True)
    ]
    assert np.mean(right[: len(pairs)]) >= 0.95
    assert np.mean(right[len(pairs) :]) <= 0.4


@pytest.mark.full
def test_a_topic_is_pushed_into_a_story(pocket: InterpretableModel) -> None:
    pairs = ms.datasets.load("pocket/topic")
    on = [pair.prompt + pair.positive for pair in pairs.split("train").group("garden")]
    off = [pair.prompt + pair.positive for pair in pairs.split("train") if pair.group != "garden"]
    vector = ms.extract(pocket, positive=on, negative=off, layers=[2], progress=None)
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs.split("report")))[:12]
    texts = pocket.generate(prompts, vector.at(2, 0.5), max_tokens=30, temp=1.0, seed=0)
    assert np.mean([scorer.judge("garden")(str(text)) for text in texts]) >= 0.75


def test_it_is_a_plain_mlx_lm_model_of_few_megabytes(pocket: InterpretableModel) -> None:
    model, tokenizer = mlx_lm.load(str(pocket_room.FOLDER))[:2]
    assert generate(model, tokenizer, "The soup was", max_tokens=12) == str(
        pocket.generate("The soup was", max_tokens=12)
    )
    assert sum(path.stat().st_size for path in pocket_room.FOLDER.iterdir()) <= 6e6
