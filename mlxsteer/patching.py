"""Activation patching: where in a model, and at which token, lies what makes two prompts differ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, TypeAlias

import mlx.core as mx
import numpy as np

from mlxsteer.exchange import Array, exchange
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import check_switch, counted, hint
from mlxsteer.patched import DIRECTIONS, Patching, alike
from mlxsteer.positions import At, Position, Prompt, Tokens
from mlxsteer.progress import Step, reporting
from mlxsteer.questions import Question, of_prompts, one_token
from mlxsteer.reading import Text, check_budget, check_model, check_progress
from mlxsteer.sites import Site

Answer: TypeAlias = "str | int | Collection[str | int]"
"""A text of one token, a token id, or a set of these, whose probabilities are taken together."""

_METRICS = ("logit_difference", "logprob")


def _pairs(model: InterpretableModel, clean: Any, corrupted: Any) -> tuple[list[Text], list[Text]]:
    """The prompts of both runs as tokens.

    Raises:
        TypeError, ValueError: they can't be encoded, aren't as many, or have different numbers of tokens.
    """
    texts = []
    for name, given in (("clean", clean), ("corrupted", corrupted)):
        try:
            texts.append([Text(ids, len(ids)) for ids in model._encode_many(given)[0]])
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    if len(texts[0]) != len(texts[1]):
        raise ValueError(f"there are {len(texts[0])} clean prompts and {len(texts[1])} corrupted ones: they are pairs.")
    for number, (a, b) in enumerate(zip(*texts, strict=True)):
        if a.prompt != b.prompt:
            shown = (
                ": " + " and ".join("|".join(map(model.token_to_str, text.tokens)) for text in (a, b))
                if model.tokenizer is not None and max(a.prompt, b.prompt) <= 40
                else ""
            )
            raise ValueError(
                f"pair {number}: the clean prompt has {a.prompt} tokens and the corrupted one {b.prompt}, and "
                f"values are exchanged token by token; word them to be of equal length{shown}."
            )
    return texts[0], texts[1]


def _sites(model: InterpretableModel, sites: str | Sequence[str]) -> list[Site]:
    """The places that are patched, in the model's order where a pattern names several.

    Raises:
        UnknownKey: a key names no place.
        ValueError: there are none; heads and other places, or places in blocks and outside, are asked for at once.
    """
    found = model._sites.expand(sites)
    if not found:
        raise ValueError("there are no places to patch: give at least one key, such as 'layers.*'.")
    for site in found:
        if bool(site.heads) != bool(found[0].heads):
            raise ValueError(f"{found[0].key} and {site.key} make no one grid: patch heads by themselves.")
        if (site.layer is None) != (found[0].layer is None):
            raise ValueError(
                f"{found[0].key} and {site.key}: one of them lies outside the blocks, where no clean pass can be gone "
                "on from; patch it by itself, or take layers.0.input, which enters the first block."
            )
    return found


def _marks(
    model: InterpretableModel, texts: Sequence[Text], at: At, together: bool
) -> tuple[list[Array], list[int | str]]:
    """For each text which tokens make up each column, (columns, tokens) of bool; and what to call the columns.

    Raises:
        PositionError: `at` means nothing for a prompt.
        ValueError: it chooses no token, or not as many of each prompt.
    """
    position, decode = Position.of(at), model.tokenizer.decode if model.tokenizer is not None else None
    chosen = []
    for number, text in enumerate(texts):
        prompt = Prompt(text.prompt, text.tokens, decode, whole=True)
        chosen.append(np.flatnonzero(Tokens([0], [text.prompt], text.prompt, [prompt]).marks(0, position)))
        if not len(chosen[-1]):
            raise ValueError(f"pair {number}: at={at!r} chooses none of its {text.prompt} tokens.")
    if together:
        marks = [np.isin(np.arange(text.prompt), one)[None] for text, one in zip(texts, chosen, strict=True)]
        return marks, [str(position.written())]
    for number, one in enumerate(chosen):
        if len(one) != len(chosen[0]):
            raise ValueError(
                f"at={at!r} chooses {len(chosen[0])} tokens of pair 0 and {len(one)} of pair {number}, and positions "
                "are averaged over pairs: name as many in each, such as at=[-2, -1], or patch them at once, each=False."
            )
    absolute = np.stack(chosen)
    ends = absolute - np.array([text.prompt for text in texts])[:, None]
    names: list[int | str] = []
    for number in range(absolute.shape[1]):
        same = next((of[0, number] for of in (absolute, ends) if len(set(of[:, number].tolist())) == 1), None)
        names.append(f"#{number}" if same is None else int(same))
    return [one[:, None] == np.arange(text.prompt) for one, text in zip(chosen, texts, strict=True)], names


def _tokens(
    model: InterpretableModel, clean: Sequence[Text], corrupted: Sequence[Text], marks: Sequence[Array]
) -> list[str]:
    """The text of each column's token, where there is one and pairs agree in it."""
    found: list[str] = []
    name: Callable[[int], str] = model.token_to_str if model.tokenizer is not None else str
    for column in range(len(marks[0])):
        seen = {
            (a.tokens[i], b.tokens[i])
            for a, b, mark in zip(clean, corrupted, marks, strict=True)
            for i in np.flatnonzero(mark[column])
        }
        texts = dict.fromkeys(repr(name(token))[1:-1].strip() for token in (seen.pop() if len(seen) == 1 else ()))
        found.append("/".join(texts))
    return found


def _question(
    model: InterpretableModel, texts: list[Text], metric: Any, answers: Any, others: Any
) -> tuple[Question, dict[str, Any]]:
    """The score behind each prompt, and what of it goes on record.

    Raises:
        TypeError, ValueError: the metric is none, or the answers don't fit it.
    """
    if callable(metric):
        if answers is not None or others is not None:
            raise ValueError("a metric of your own gets the logits alone: leave answers= and others= out.")
        return of_prompts(model, texts, metric), {}
    if metric not in _METRICS:
        raise ValueError(
            f"metric is 'logit_difference', 'logprob' or a callable on logits, not {metric!r}.{hint(metric, _METRICS)}"
        )
    wanted = {"answers": answers, "others": others} if metric == "logit_difference" else {"answers": answers}
    if missing := [name for name, given in wanted.items() if given is None]:
        raise ValueError(f"metric={metric!r} needs {missing[0]}=, a text of one token such as ' good', or a token id.")
    if metric == "logprob" and others is not None:
        raise ValueError(
            "metric='logprob' is that of the answers alone: leave others= out, or take 'logit_difference'."
        )
    ids = {name: _answers(model, given, name, len(texts)) for name, given in wanted.items()}
    for number, (a, b) in enumerate(zip(*ids.values(), strict=True)) if len(ids) == 2 else ():
        if both := set(a) & set(b):
            raise ValueError(f"pair {number}: token {min(both)} is in both answers= and others=: they are told apart.")
    right, *wrong = (_log_sum(each) for each in ids.values())

    def score(logits: mx.array, pairs: Array) -> mx.array:
        return right(logits, pairs) - (wrong[0](logits, pairs) if wrong else mx.logsumexp(logits, axis=-1))

    return Question(texts, [range(t.prompt - 1, t.prompt) for t in texts], False, metric, score), ids


def _answers(model: InterpretableModel, given: Any, name: str, count: int) -> list[list[int]]:
    """The token ids of each pair's answer.

    Raises:
        TypeError, ValueError: one is no token, or they aren't as many as pairs.
    """
    if isinstance(given, (str, int, np.integer, set, frozenset)):
        given = [given] * count
    elif isinstance(given, mx.array):
        given = np.array(given)
    if not isinstance(given, (list, tuple, np.ndarray)) or len(given) != count:
        raise ValueError(
            f"{name} is a text of one token, a token id or a set of these for all pairs, or a list with one for each "
            f"of {counted(count, 'pair')}, not {given!r:.80}."
        )
    found = []
    for one in given:
        several = list(one) if isinstance(one, (set, frozenset)) else [one]
        if not several:
            raise ValueError(f"{name}: an answer is an empty set; it needs a token.")
        found.append(sorted({_answer(model, token, name) for token in several}))
    return found


def _answer(model: InterpretableModel, given: Any, name: str) -> int:
    if isinstance(given, str):
        return one_token(model, given, name)
    if isinstance(given, bool) or not isinstance(given, (int, np.integer)):
        raise TypeError(f"{name}: an answer is a text of one token such as ' good', or a token id, not {given!r:.80}.")
    try:
        return model.encode([int(given)])[0]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _log_sum(ids: Sequence[Sequence[int]]) -> Callable[[mx.array, Array], mx.array]:
    """(logits, numbers of pairs) → ``log Σ exp(logit)`` over each pair's tokens, the logit itself of one token."""
    most = max(map(len, ids))
    columns = mx.array([[*one, *[one[0]] * (most - len(one))] for one in ids])
    real = mx.array([[i < len(one) for i in range(most)] for one in ids])

    def found(logits: mx.array, pairs: Array) -> mx.array:
        rows = mx.array(pairs)
        chosen = mx.take_along_axis(logits, columns[rows], axis=-1)
        return mx.logsumexp(mx.where(real[rows], chosen, -mx.inf), axis=-1)

    return found


def patch(
    model: InterpretableModel,
    clean: Any,
    corrupted: Any,
    sites: str | Sequence[str] = "layers.*",
    *,
    answers: Answer | Sequence[Answer] | None = None,
    others: Answer | Sequence[Answer] | None = None,
    metric: Literal["logit_difference", "logprob"] | Callable[[mx.array], mx.array] = "logit_difference",
    direction: Literal["denoise", "noise"] = "denoise",
    at: At = "all",
    each: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool | Step | None = False,
) -> Patching:
    """Put activations of one prompt into the run of another, place by place and token by token: activation patching.

    With x the patched prompt and y the other, ``m(x | a_s,p(x) := a_s,p(y))`` for every place s and position p, with
    the metric m behind the last token, and the recovery ``(m(patched) − m(corrupted)) / (m(clean) − m(corrupted))``.
    Denoising (clean into corrupted) finds what is enough for the clean answer, noising what is needed for it. Vig et
    al. 2020, arXiv 2004.12265; Meng et al. 2022, arXiv 2202.05262; Zhang & Nanda 2024, Towards Best Practices of
    Activation Patching, arXiv 2309.16042; Heimersheim & Nanda 2024, arXiv 2404.15255.

    Each prompt runs once. Every layer's patches go on from there as rows of a batch: the blocks before it aren't run
    again, nor are tokens before the first one in which the prompts differ, and the head runs on the last token. A patch
    whose value is what is there already is not run; it changes nothing, bit for bit. Families that can't go on from a
    clean pass, or whose rows differ in a batch, run patch by patch. The numbers are those of a loop of
    ``model.trace(corrupted, interventions={key: iv.replace_with(...)})``, to float32 rounding.

    Args:
        model: the model.
        clean: a prompt (text, token ids, chat messages), or a list of prompts.
        corrupted: its counterpart, or theirs, of as many tokens each.
        sites: a key, glob or range, or a list of these, such as ``"layers.*"`` (the residual stream),
            ``"layers.*.mlp"``, ``"layers.*.attn"``, or ``"layers.*.attn.heads"``, each head by itself.
        answers: the clean prompt's answer: a text of one token (mind the space before it) or its id; a set of these,
            whose probabilities are summed; for several pairs also a list with one for each.
        others: the answer that it is compared with, for the logit difference.
        metric: ``"logit_difference"``, ``logit(answer) − logit(other)``, of sets ``log P(answers) − log P(others)``;
            ``"logprob"``, ``log P(answer)`` in nats; or a callable from logits behind the last token, (rows,
            vocabulary) float32, to (rows,), where a row is one prompt under one patch.
        direction: ``"denoise"`` patches clean activations into the corrupted run, ``"noise"`` the other way round.
        at: which tokens; they are looked up in the clean prompt, all of which is prompt.
        each: patch every token by itself; False patches all of them at once. By default each, but heads all at once.
        batch_tokens: the most tokens in one batch, copies for patches included; memory is bounded by it.
        progress: True for a bar on a terminal, or a function that is called with the pairs done and in all.

    Returns:
        A `Patching`.

    Raises:
        TypeError: no model, no prompts.
        UnknownKey: a key names no place.
        PositionError: `at` means nothing for a prompt.
        ValueError: the prompts of a pair differ in their number of tokens; positions aren't as many in each pair; an
            answer is no single token; a metric isn't finite.

    Warns:
        UserWarning: clean and corrupted don't differ in the metric, so that there is nothing to recover.
    """
    check_model(model)
    check_budget(batch_tokens)
    check_progress(progress)
    if each is not None:
        check_switch("each", each)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is 'denoise' or 'noise', not {direction!r}.{hint(direction, DIRECTIONS)}")
    places = _sites(model, sites)
    runs = _pairs(model, clean, corrupted)
    together = bool(places[0].heads) if each is None else not each
    texts, donors = runs if direction == "noise" else runs[::-1]
    marks, names = _marks(model, runs[0], at, together)
    question, ids = _question(model, texts, metric, answers, others)
    with reporting(progress, "patching") as step:
        found = exchange(model, question, donors, marks, places, batch_tokens=batch_tokens, step=step)
    if direction == "noise":
        first, second = found.base, found.donors
    else:
        first, second = found.donors, found.base
    scores = found.scores if places[0].heads else found.scores[..., 0]
    loop = len(model.layers) * sum(
        text.prompt * int(np.isfinite(one).sum() + 2) for text, one in zip(texts, scores, strict=True)
    )
    record = {**model.identity, "at": repr(Position.of(at).written()), "each": not together, **ids,
              "clean": [text.tokens for text in runs[0]], "corrupted": [text.tokens for text in runs[1]]}  # fmt: skip
    made = Patching(scores, first, second, [site.key for site in places], names, _tokens(model, *runs, marks),
                    direction, question.metric, found.block_tokens, loop, record)  # fmt: skip
    if (same := np.flatnonzero(alike(first, second))).size:
        said = ", ".join(map(str, same[:8].tolist())) + (", …" if len(same) > 8 else "")
        warnings.warn(
            f"clean and corrupted don't differ in {question.metric} in {counted(len(same), 'pair')} of {len(first)} "
            f"({said}; {first[same[0]]:g} and {second[same[0]]:g} in pair {same[0]}): there is no recovery of it, only "
            "the change.",
            stacklevel=2,
        )
    return made
