"""Word-pair tasks: accuracy with examples, without, and with a task's mean state added (a function vector)."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from mlxsteer.pocket import scorer

from .corpus import TASK_WEIGHTS
from .pairs import few_shot_prompt, split_task_words
from .runner import Edits, Runner, add_at_last


def measure_tasks(runner: Runner) -> dict:
    """Accuracy with five examples, without, and without but with the task's mean state added."""
    rng = random.Random(91)
    tasks = list(TASK_WEIGHTS)
    words = {task: split_task_words(task) for task in tasks}
    means = {}
    for task in tasks:
        train = words[task]["train"]
        means[task] = runner.last_states([few_shot_prompt(task, rng.choice(train), rng) for _ in range(48)]).mean(0)
    zero_words = sorted({word for task in tasks for word in words[task]["train"]})
    neutral = runner.last_states([f"{word} ->" for word in zero_words]).mean(0)
    result: dict = {"five examples": {}, "zero-shot": {}, "vector": {}}
    by_layer: dict[int, list[float]] = defaultdict(list)
    for task in tasks:
        choosing = words[task]["choose"]
        for layer in range(1, 6):
            edit = add_at_last(means[task][layer] - neutral[layer])
            by_layer[layer].append(accuracy(runner, task, choosing, [f"{w} ->" for w in choosing], {layer: edit}))
    middle = max((2, 3, 4), key=lambda layer: (sum(by_layer[layer]) / len(by_layer[layer]), -layer))
    result["layer"], result["mean by layer"] = middle, {layer: sum(v) / len(v) for layer, v in by_layer.items()}
    for task in tasks:
        test = words[task]["report"]
        result["five examples"][task] = accuracy(runner, task, test, [few_shot_prompt(task, w, rng) for w in test])
        zero = [f"{word} ->" for word in test]
        result["zero-shot"][task] = accuracy(runner, task, test, zero)
        edit = add_at_last(means[task][middle] - neutral[middle])
        result["vector"][task] = accuracy(runner, task, test, zero, {middle: edit})
    return result


def accuracy(
    runner: Runner, task: str, words: Sequence[str], prompts: Sequence[str], edits: Edits | None = None
) -> float:
    """Share of right greedy answers."""
    texts = runner.decode(runner.generate(prompts, 8, 0.0, 0, edits))
    return sum(scorer.answer_is_right(task, word, text) for word, text in zip(words, texts, strict=True)) / len(words)
