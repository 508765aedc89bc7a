"""What a head does to an answer by every path: its causal indirect effect, for all heads of a model.

A prompt whose labels are shuffled is run once up to its last token; a head's value at that token is then replaced by
its mean over prompts with the right labels, one batch row per head, and the model goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer.continuation import Continuation, first_edited, passes_over, put, shares
from mlxsteer.display import Displayed, Shown, furthest, heat, written_table
from mlxsteer.heads import layers_with_heads, ranked, values_of
from mlxsteer.interventions.base import Function, Intervention
from mlxsteer.interventions.files import as_json
from mlxsteer.measures.divergence import edits_of, outside_blocks, positions_of
from mlxsteer.measures.uncertainty import Interval, bootstrap
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import counted
from mlxsteer.positions import Position
from mlxsteer.progress import Step, reporting
from mlxsteer.questions import Question, groups
from mlxsteer.reading import Text, check_budget, check_model, check_progress
from mlxsteer.sites import Site
from mlxsteer.word_pairs import InContextPrompt, in_context_prompts

Array = np.ndarray[Any, Any]
LAST = Position.of(-1)


def answered(model: InterpretableModel, prompts: Sequence[InContextPrompt]) -> list[Text]:
    """Each prompt with its answer behind it, as tokens.

    Raises:
        ValueError: the tokenizer joins the end of a prompt and its answer into one token.
    """
    texts = []
    for number, prompt in enumerate(prompts):
        before, whole = model.encode(prompt.text), model.encode(prompt.text + prompt.answer)
        if whole[: len(before)] != before or len(whole) == len(before):
            raise ValueError(
                f"prompt {number}: the tokenizer joins the end of the prompt and the answer {prompt.answer!r}; take "
                "another template."
            )
        texts.append(Text(whole, len(before)))
    return texts


def mean_head_values(
    model: InterpretableModel, prompts: Sequence[InContextPrompt], *, batch_tokens: int = 4096
) -> dict[int, mx.array]:
    """The mean value of every head at the last token of in-context prompts: what `indirect_effects` puts in place.

    Args:
        model: the model.
        prompts: prompts with the right labels, of one task.
        batch_tokens: the most tokens in one batch, padding included.

    Returns:
        layer → (heads, head_dim) float32.

    Raises:
        TypeError: no model, no prompts as `in_context` makes them.
    """
    check_model(model)
    check_budget(batch_tokens)
    texts = [Text(ids, len(ids)) for ids in (model.encode(one.text) for one in in_context_prompts(prompts))]
    return {layer: rows.mean(axis=0) for layer, rows in values_of(model, texts, batch_tokens).items()}


@dataclass(frozen=True, eq=False)
class IndirectEffects(Displayed):
    """The causal indirect effect of every head on the probability of the right answer.

    Attributes:
        effects: ``P(answer | head at its mean) − P(answer)``, (prompts, layers, heads); NaN in layers without heads.
        base: ``P(answer)`` of the prompts as they are, (prompts,).
        block_tokens: what it cost: tokens times blocks that ran, the shared beginnings among them.
        loop_block_tokens: what one forward of the whole prompt for each head, and one without, would have cost.
    """

    effects: Array
    base: Array
    block_tokens: int = 0
    loop_block_tokens: int = 0
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> Array:
        """The mean over prompts, (layers, heads)."""
        found: Array = self.effects.mean(axis=0)
        return found

    def top(self, count: int = 10) -> list[tuple[int, int, float]]:
        """The heads that raise the answer most: (layer, head, mean effect), highest first."""
        return ranked(self.mean, count)

    def __repr__(self) -> str:
        most = "".join(f"; most: layer {layer} head {head} {value:+.3f}" for layer, head, value in self.top(1))
        return f"IndirectEffects({len(self.base)} prompts{most})"

    def table(self, count: int = 10) -> str:
        """The heads with the largest effects, and what finding them cost, in plain text."""
        rows = [(str(layer), str(head), f"{value:+.4f}") for layer, head, value in self.top(count)]
        return f"{written_table('causal indirect effect', ('layer', 'head', 'effect'), rows)}\n{self._told()}"

    def _told(self) -> str:
        share = f"; {self.block_tokens / self.loop_block_tokens:.3f} of a loop's" if self.loop_block_tokens else ""
        return f"P(answer) {self.base.mean():.4f} before; cost {self.block_tokens:,} block-tokens{share}"

    def _shown(self) -> Shown:
        layers, heads = furthest(self.mean, 0.0, 40, 12)
        grid = self.mean[np.ix_(layers, heads)]
        names = (f"{len(some)} of {counted(count, name)}" for some, count, name in
                 zip((layers, heads), self.mean.shape, ("layer", "head"), strict=True))  # fmt: skip
        return Shown(
            f"causal indirect effect; {' × '.join(names)}",
            ("layer", *map(str, heads)),
            [
                (str(layer), *("" if np.isnan(x) else f"{x:+.4f}" for x in row))
                for layer, row in zip(layers, grid, strict=True)
            ],
            heat=heat(grid),
            foot=self._told(),
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON; with a path, also written there, whole or not at all."""
        data = {"effects": self.effects.tolist(), "base": self.base.tolist(), "block_tokens": self.block_tokens,
                "loop_block_tokens": self.loop_block_tokens, "record": self.record}  # fmt: skip
        return as_json(data, path)

    def plot(self, path: str | Path | None = None) -> Any:
        """The mean over prompts as a heat map of layers × heads; a matplotlib figure.

        Args:
            path: also write it there, as PNG, PDF or SVG by suffix.
        """
        from mlxsteer.plots import plot_heads

        return plot_heads(self.mean, "causal indirect effect", "change of P(answer)", [], path)


def indirect_effects(
    model: InterpretableModel,
    prompts: Sequence[InContextPrompt],
    means: Mapping[int, Any],
    *,
    batch_tokens: int = 4096,
    progress: bool | Step | None = False,
) -> IndirectEffects:
    """The causal indirect effect of every head: what its mean on right prompts does in wrong ones, at the last token.

    ``CIE(l, j) = P(y | p̃, a_lj := ā_lj) − P(y | p̃)``, with p̃ a prompt whose labels are shuffled, y the first token of
    the right answer, and ā the mean value of the head over prompts with the right labels. Todd et al. 2023, Function
    Vectors in Large Language Models, arXiv 2310.15213.

    All tokens but the last run once for each prompt; behind them each layer's heads are rows of one batch, one token
    long, that starts at that layer. With T tokens, L layers and H heads in each that is ``T·L + H·L·(L+1)/2``
    block-tokens for a prompt, and a loop's are ``(H·L + 1)·T·L``. Families whose rows differ in a batch, or that can't
    go on from a copied cache, cost more; `block_tokens` says what it was.

    Args:
        model: the model.
        prompts: shuffled prompts, as `in_context` makes them.
        means: layer → (heads, head_dim), as `mean_head_values` gives them.
        batch_tokens: the most tokens whose keys and values are in one batch.
        progress: True for a bar on a terminal, or a function that is called with the prompts done and in all.

    Raises:
        TypeError: no model, no prompts as `in_context` makes them.
        ValueError: the means aren't those of this model's heads.
    """
    check_model(model)
    check_budget(batch_tokens)
    check_progress(progress)
    listed = in_context_prompts(prompts)
    sites = layers_with_heads(model)
    exchanged = _means_of(model, sites, means)
    texts = answered(model, listed)
    count = max(int(site.heads or 0) for site in sites.values())
    grid, base = np.full((len(texts), len(model.layers), count), np.nan), np.zeros(len(texts))
    cost = 0
    with reporting(progress, "heads") as step:
        done = 0
        for rows in _of_one_length(model, texts, count, batch_tokens):
            one, score = _clean(model, [texts[i] for i in rows])
            base[rows] = one.clean(score)
            for layer, site in sites.items():
                for some in _batches_of_heads(model, int(site.heads or 0)):
                    edit = _patched(exchanged[layer], some)
                    found = one.edited([(site, edit)], len(some), score)
                    for head, values in zip(some, found, strict=True):
                        grid[rows, layer, head] = values - base[rows]
            cost += one.block_tokens
            done += len(rows)
            step(done, len(texts))
    every = sum(int(site.heads or 0) for site in sites.values()) + 1
    loop = sum(text.prompt for text in texts) * len(model.layers) * every
    record = {"model": model.identity, "prompts": len(texts), "shuffled": all(one.shuffled for one in listed)}
    return IndirectEffects(grid, base, cost, loop, record)


def _means_of(model: InterpretableModel, sites: Mapping[int, Site], means: Any) -> dict[int, mx.array]:
    if not isinstance(means, Mapping):
        raise TypeError(
            f"means are a dict from layers to (heads, head_dim), as mean_head_values gives, not {means!r:.60}."
        )
    if missing := [layer for layer in sites if layer not in means]:
        raise ValueError(f"the means have no layer {missing[0]}: mean_head_values of this model gives every layer.")
    found = {}
    for layer, site in sites.items():
        shape = (site.heads, model._sites.width(site))
        found[layer] = mx.array(means[layer]).astype(mx.float32)
        if found[layer].shape != shape:
            raise ValueError(f"the means of layer {layer} have shape {found[layer].shape}; its heads are {shape}.")
    mx.eval(list(found.values()))
    return found


def _of_one_length(model: InterpretableModel, texts: Sequence[Text], heads: int, budget: int) -> Iterator[list[int]]:
    """Numbers of prompts that are run together: of one length, so that all but the last token is shared."""
    by_length: dict[int, list[int]] = {}
    for number, text in enumerate(texts):
        by_length.setdefault(text.prompt, []).append(number)
    for length, numbers in sorted(by_length.items()):
        size = max(1, budget // (length * heads)) if model._sites.family.batch else 1
        for begin in range(0, len(numbers), size):
            yield numbers[begin : begin + size]


def _batches_of_heads(model: InterpretableModel, count: int) -> list[list[int]]:
    every = list(range(count))
    return [every] if model._sites.family.batch else [[head] for head in every]


def _clean(
    model: InterpretableModel, texts: Sequence[Text]
) -> tuple[Continuation, Callable[[mx.array, Array], mx.array]]:
    """A clean pass over prompts of one length, and the probability of each one's answer."""
    targets = np.array([text.tokens[text.prompt] for text in texts])
    alone = [Text(text.tokens[: text.prompt], text.prompt) for text in texts]

    def score(logits: mx.array, positions: Array) -> mx.array:
        chosen = mx.take_along_axis(logits, mx.array(targets[positions])[:, None], axis=-1)[:, 0]
        return mx.exp(chosen - mx.logsumexp(logits, axis=-1))

    return Continuation(model, alone, [range(text.prompt - 1, text.prompt) for text in alone], LAST), score


def _patched(mean: mx.array, heads: Sequence[int]) -> Intervention:
    """At the last token, each copy of the rows with another head at its mean."""
    chosen = np.eye(mean.shape[0], dtype=bool)[list(heads)]
    return put(mean, mx.array(chosen[:, None, None, :, None]), LAST)


# -- right answers -------------------------------------------------------------------------------------------------


class TaskAnswers:
    """Which in-context prompts a model answers rightly, plain and under edits.

    An answer is right where every token of it is the most probable one behind the prompt and the answer's tokens before
    it: then greedy decoding writes it.

    Args:
        model: the model.
        prompts: the prompts.
        at: the positions that edits will touch.
        plain: edits will lie outside the blocks.
        batch_tokens: the most tokens in one batch.
        copies: how many variants of edits will be tried at once.

    Raises:
        TypeError: no model, no prompts as `in_context` makes them.
    """

    def __init__(
        self,
        model: InterpretableModel,
        prompts: Sequence[InContextPrompt],
        *,
        at: Sequence[Position] = (LAST,),
        plain: bool = False,
        batch_tokens: int = 4096,
        copies: int = 1,
    ) -> None:
        check_model(model)
        check_budget(batch_tokens)
        self.model, self.prompts = model, in_context_prompts(prompts)
        texts = answered(model, self.prompts)
        needed = [range(text.prompt - 1, len(text.tokens) - 1) for text in texts]
        targets = np.array([text.tokens[p + 1] for text, where in zip(texts, needed, strict=True) for p in where])

        def score(logits: mx.array, positions: Array) -> mx.array:
            return mx.argmax(logits, axis=-1) == mx.array(targets[positions])

        question = Question(texts, needed, False, "right answers", score)
        shared = shares(model, plain=plain)
        firsts = [first_edited(model, *one, list(at)) if shared else 0 for one in zip(texts, needed, strict=True)]
        self._counts = [len(where) for where in needed]
        alone = not model._sites.family.batch
        self._passes = [
            each
            for group in groups(question, firsts, copies, batch_tokens, alone=alone)
            for each in passes_over(model, question, group, list(at), plain=plain)
        ]
        self.base = self._right(lambda one, score: one.clean(score)[None], 1)[0]
        """Of the model as it is, (prompts,) of bool."""

    def under(self, make: Callable[[int], Sequence[tuple[Site, Intervention]]], copies: int = 1) -> Array:
        """Under variants of edits, (copies, prompts) of bool.

        Args:
            make: from how many texts a pass has to edits of so many rows, one whole copy of the texts after the other.
            copies: how many.
        """
        return self._right(lambda one, score: one.edited(make(len(one.rows)), copies, score), copies)

    def added(self, site: Site, vectors: mx.array) -> Array:
        """With each of some vectors added at a place at the last token, (vectors, prompts) of bool.

        Args:
            site: the place.
            vectors: (k, D); rows of one batch.
        """
        if not self.model._sites.family.batch:
            return np.concatenate([self.under(_adding(site, vector[None])) for vector in vectors])
        return self.under(_adding(site, vectors), len(vectors))

    def _right(self, run: Callable[[Continuation, Any], Array], copies: int) -> Array:
        found = np.zeros((copies, len(self.prompts)), bool)
        for one, rows, score in self._passes:
            ends = np.cumsum([self._counts[i] for i in rows])[:-1]
            for i, part in zip(rows, np.split(run(one, score), ends, axis=1), strict=True):
                found[:, i] = part.all(axis=1)
        return found


def _adding(site: Site, vectors: mx.array) -> Callable[[int], list[tuple[Site, Intervention]]]:
    def make(rows: int) -> list[tuple[Site, Intervention]]:
        each = mx.repeat(vectors, rows, axis=0)[:, None]
        mx.eval(each)
        return [(site, Function(lambda x: x + each.astype(x.dtype), at=LAST))]

    return make


def task_accuracy(
    model: InterpretableModel,
    prompts: Sequence[InContextPrompt],
    interventions: Mapping[str, Any] | None = None,
    *,
    batch_tokens: int = 4096,
) -> Interval:
    """The share of in-context prompts that a model answers rightly, steered or not, with its interval over prompts.

    Right is an answer of which every token is the most probable one, so that greedy decoding writes it.

    Args:
        model: the model.
        prompts: prompts, as `in_context` makes them.
        interventions: a key dict; None for the model as it is.
        batch_tokens: the most tokens in one batch, padding included.

    Raises:
        TypeError: no model, no prompts, no key dict.
        UnknownKey: a key names no place.
        ValueError: a constant doesn't fit its place.
    """
    check_model(model)
    if interventions is None:
        return share_of(TaskAnswers(model, prompts, batch_tokens=batch_tokens).base)
    edits = edits_of(model, interventions)
    answers = TaskAnswers(
        model, prompts, at=positions_of(edits), plain=outside_blocks(edits), batch_tokens=batch_tokens
    )
    return share_of(answers.under(lambda _: edits)[0])


def share_of(right: Array) -> Interval:
    """The share that is right, with its interval; of one prompt there is none."""
    values = right.astype(np.float64)
    return bootstrap(values) if len(values) > 1 else Interval(float(values[0]), np.nan, np.nan)
