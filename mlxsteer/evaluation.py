"""What a given steering does, what it costs, and what chance and a plain instruction would have done: one report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer import datasets
from mlxsteer.display import Displayed, Shown
from mlxsteer.generation import Generation
from mlxsteer.interventions.base import Intervention
from mlxsteer.interventions.files import as_json, write_whole
from mlxsteer.interventions.operators import AddVector
from mlxsteer.measures.divergence import (
    Divergence,
    Reference,
    edits_of,
    listed,
    outside_blocks,
    perplexity,
    positions_of,
)
from mlxsteer.measures.effect import Steerability, steerability
from mlxsteer.measures.nulls import null_p_value
from mlxsteer.measures.preference import Preferences
from mlxsteer.measures.text import TextStatistics, text_statistics
from mlxsteer.measures.uncertainty import Interval, bootstrap, generator, paired_difference
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import PAIR_HASHES, ContrastPair, PairSet, checked, counted, pairs_seen
from mlxsteer.progress import Step, reporting
from mlxsteer.questions import check_count
from mlxsteer.reading import as_chat, encode_side
from mlxsteer.sites import Site
from mlxsteer.vectors import SteeringVector

_NULLS = 20_242
"""Key of the nulls' draws, so that they are no one else's."""

MULTIPLES = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Of the given strengths, for the dose–response."""


@dataclass(frozen=True, eq=False)
class Evaluation(Displayed):
    """Measures of one steering.

    Attributes:
        shift: mean shift of ``log P(positive) − log P(negative)`` in nats, with its interval over pairs.
        base: the unsteered preference of each pair, (pairs,).
        steered: the steered preference of each pair, (pairs,).
        curve: dose–response over multiples of the strengths.
        divergence: KL(base ‖ steered) on the unsteered model's continuations of neutral prompts.
        perplexity_ratio: perplexity of steered text under the unsteered model, over that of its own text; NaN where
            one of them is empty.
        own_text, steered_text: statistics of both.
        samples: (prompt, unsteered text, steered text) of some neutral prompts.
        nulls: mean shifts by random vectors in place of the added ones; empty where something else is done than adding.
        p_value: of the shift against them, one-sided; NaN without nulls.
        instruction: mean shift by the instruction in place of the steering; None if none was given.
        over_instruction: mean of what the steering does beyond the instruction; None if none was given.
        retention: accuracy on the two-option questions, steered over unsteered; None if none were given, or the
            unsteered model answers none of them.
        accuracy: both accuracies, (unsteered, steered); None if none were given.
        record: model, interventions, data, seed, versions.
    """

    shift: Interval
    base: np.ndarray[Any, Any]
    steered: np.ndarray[Any, Any]
    curve: Steerability
    divergence: Divergence
    perplexity_ratio: float
    own_text: TextStatistics
    steered_text: TextStatistics
    samples: tuple[tuple[str, str, str], ...]
    nulls: tuple[float, ...]
    p_value: float
    instruction: Interval | None
    over_instruction: Interval | None
    retention: float | None
    accuracy: tuple[float, float] | None
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def warnings(self) -> list[str]:
        """What speaks against relying on it, in words; empty where nothing does."""
        said = []
        if not self.shift.excludes(0.0) or self.shift.value <= 0:
            said.append(f"no evidence that this steers: the shift is {self.shift} nats.")
        if len(self.nulls) >= 19 and self.p_value >= 0.05:
            said.append(f"random vectors of its length do as much (p = {self.p_value:.2f}).")
        elif 0 < len(self.nulls) < 19:
            said.append(f"{counted(len(self.nulls), 'random vector')} can't show p < 0.05: take 20.")
        if len(self.base) < 16:
            said.append(f"the interval comes from {counted(len(self.base), 'pair')}, and is not to be relied on.")
        if self.curve.anti_steerable > 0.25:
            said.append(f"{self.curve.anti_steerable:.0%} of the pairs are moved the wrong way.")
        if self.record.get("split") not in (None, "report"):
            said.append(f"the pairs are of the split {self.record['split']}: layer or vector may come from them.")
        if isinstance(seen := self.record.get("pairs_seen"), int) and seen:
            said.append(
                f"the vector was computed from {seen} of the {counted(len(self.base), 'pair')}: what it does on them "
                "looks better than it is."
            )
        if without := self.record.get("no_nulls_for"):
            said.append(f"what chance would do is unknown: {_without_nulls(without)}.")
        return said

    def __repr__(self) -> str:
        return f"Evaluation(shift {self.shift} nats, {self.divergence}, perplexity × {self.perplexity_ratio:.2f})"

    def rows(self) -> list[tuple[str, str, str]]:
        """Every measure as (name, value, what it says)."""
        own, text, found = self.own_text, self.steered_text, self.divergence
        rows = [
            ("preference, unsteered", f"{self.base.mean():+.2f}", "mean log P(positive) − log P(negative), nats"),
            ("shift", str(self.shift), f"nats, {self.shift.level:.0%} interval over {counted(len(self.base), 'pair')}"),
            ("slope", str(self.curve.mean_slope), "nats per multiple of the strength"),
            ("fit", f"{self.curve.fits.mean():.2f}", "R² of the dose–response, mean over pairs"),
            ("rank correlation", f"{self.curve.rank_correlations.mean():+.2f}", "of strength and effect, mean"),
            ("anti-steerable", f"{self.curve.anti_steerable:.0%}", "pairs that move the wrong way"),
        ]
        if self.nulls:
            rows += [
                ("random vectors", f"{np.mean(self.nulls):+.2f}, at most {max(self.nulls):+.2f}",
                 f"mean shifts by {len(self.nulls)} of the same length"),
                ("p", f"{self.p_value:.3f}", "of the shift against them, one-sided"),
            ]  # fmt: skip
        else:
            without = self.record.get("no_nulls_for")
            rows.append(("random vectors", "none drawn", _without_nulls(without) if without else "none were asked for"))
        if self.instruction is not None:
            rows += [
                ("instruction", str(self.instruction), "shift by the instruction in place of the steering"),
                ("beyond it", str(self.over_instruction), "what the steering does more, pair by pair"),
            ]
        rows += [
            ("KL, mean", f"{found.mean:.3g}", "KL(base ‖ steered) per token of neutral text, nats"),
            ("KL, 95th percentile", f"{found.p95:.3g}", f"median {found.p50:.2g}, largest {found.largest:.3g}"),
            ("perplexity ratio", f"{self.perplexity_ratio:.2f}", "steered text over unsteered, to the unsteered model"),
            ("distinct 1, 2", f"{text.distinct_1:.2f}, {text.distinct_2:.2f}",
             f"unsteered {own.distinct_1:.2f}, {own.distinct_2:.2f}"),
            ("longest repeat", f"{text.longest_repeat:.1f}", f"tokens; unsteered {own.longest_repeat:.1f}"),
            ("entropy", f"{text.entropy:.2f}", f"of a text's tokens, nats; unsteered {own.entropy:.2f}"),
            ("length", f"{text.length:.1f}", f"tokens; unsteered {own.length:.1f}"),
        ]  # fmt: skip
        if self.accuracy is not None:
            said = f"accuracy on two options {self.accuracy[1]:.0%}, unsteered {self.accuracy[0]:.0%}"
            rows.append(
                (
                    f"retention, {self.record['questions']} questions",
                    "" if self.retention is None else f"{self.retention:.2f}",
                    said,
                )
            )
        return rows

    def table(self) -> str:
        """All measures in plain text."""
        return self._shown().plain(110, foot=True)

    def _shown(self) -> Shown:
        return Shown(
            f"{self.record.get('model', 'steering')}: {self.record.get('interventions', '')}",
            ("measure", "value", ""),
            self.rows(),
            texts=range(3),
            foot="\n".join(f"Warning: {warning}" for warning in self.warnings),
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON; with a path, also written there, whole or not at all."""
        data = {
            "shift": asdict(self.shift), "base": self.base.tolist(), "steered": self.steered.tolist(),
            "mean_slope": asdict(self.curve.mean_slope), "anti_steerable": self.curve.anti_steerable,
            "multiples": self.curve.strengths.tolist(), "mean_curve": self.curve.mean_curve.tolist(),
            "changes": [asdict(one) for one in self.curve.changes()],
            "divergence": asdict(self.divergence), "perplexity_ratio": self.perplexity_ratio,
            "own_text": asdict(self.own_text), "steered_text": asdict(self.steered_text),
            "samples": [list(sample) for sample in self.samples], "nulls": list(self.nulls),
            "p_value": self.p_value if self.nulls else None,
            "instruction": asdict(self.instruction) if self.instruction else None,
            "over_instruction": asdict(self.over_instruction) if self.over_instruction else None,
            "retention": self.retention, "accuracy": self.accuracy, "warnings": self.warnings, "record": self.record,
        }  # fmt: skip
        return as_json(data, path)

    def to_html(self, path: str | Path) -> Path:
        """One page with the measures, the pictures, some texts and the record; it needs no other file.

        Raises:
            ValueError: the path doesn't end in .html.
            ImportError: matplotlib isn't installed.
        """
        from mlxsteer.reports import evaluation_page

        if Path(path).suffix.lower() != ".html":
            raise ValueError(f"{path}: a report is written as .html; for a picture alone there is plot(path).")
        page = evaluation_page(self)
        write_whole(path, lambda temporary: Path(temporary).write_text(page, encoding="utf-8"))
        return Path(path)

    def plot(self, path: str | Path | None = None) -> Any:
        """Dose–response, pairs, nulls and text, as one picture; a matplotlib figure.

        Args:
            path: also write it there, as PNG, PDF or SVG by suffix.
        """
        from mlxsteer.plots import plot_evaluation

        return plot_evaluation(self, path)


def _without_nulls(places: Mapping[str, str]) -> str:
    """Why there are no random vectors, in words."""
    told = ", ".join(f"{key} ({name})" for key, name in places.items())
    return f"random vectors stand in for add_vector alone, and something else is done at {told}"


def evaluate(
    model: InterpretableModel,
    interventions: Mapping[str, Any],
    pairs: Iterable[ContrastPair],
    *,
    vector: SteeringVector | None = None,
    neutral: Iterable[Any] | None = None,
    questions: Iterable[ContrastPair] | None = None,
    instruction: str | None = None,
    nulls: int = 20,
    tokens: int = 24,
    max_tokens: int = 40,
    chat: bool = False,
    seed: int = 0,
    batch_tokens: int = 4096,
    progress: bool | Step | None = True,
) -> Evaluation:
    """Measure a given steering: effect with interval, nulls and baseline, and side effects.

    Args:
        model: the model.
        interventions: a key dict, such as ``vector.at(5, 2.0)`` or ``choice.interventions``.
        pairs: contrast pairs that nothing was chosen on; of a set with a ``"report"`` split those are used, else all.
        vector: the vector that the interventions are made of, which may say what pairs it was computed from: how many
            of these it has seen is told in the warnings. A choice's interventions know it without.
        neutral: prompts to measure side effects on; `datasets.neutral` for the model unless given.
        questions: two-option pairs whose positive side is the right answer, for what the steering costs in capability.
        instruction: a sentence that asks for the behaviour, to hold the steering against: put before each prompt; in
            a chat a system message, or joined to the one that is there, or at the head of the user's first message
            where the chat template takes no system message.
        nulls: random vectors of the same lengths to hold it against; where anything else is done than adding one
            vector at each place, none are drawn, and the table and the warnings say so.
        tokens: of the unsteered model's continuation of each neutral prompt, for the KL.
        max_tokens: of the texts that are generated from the neutral prompts, sampled at temperature 1.
        chat: prompts are a user's messages.
        seed: of nulls, sampling and intervals.
        batch_tokens: the most tokens in one batch.
        progress: True for a bar on a terminal, or a function that is called with the number of steps done and in all.

    Returns:
        An `Evaluation`.

    Raises:
        TypeError: no key dict, no pairs, or no vector.
        ValueError: there are no pairs or prompts, or the chat template refuses the instruction.
        UnknownKey: a key names no place.
    """
    edits = edits_of(model, interventions)
    if vector is not None and not isinstance(vector, SteeringVector):
        raise TypeError(f"vector is a SteeringVector, not {type(vector).__name__}.")
    check_count(nulls, "nulls", 0)
    check_count(max_tokens, "max_tokens", 1)
    if instruction is not None and not (isinstance(instruction, str) and instruction.strip()):
        raise ValueError(f"an instruction is a sentence, not {instruction!r}.")
    asked_about = None if questions is None else list(questions)
    if asked_about is not None and not asked_about:
        raise ValueError("there are no questions: give at least one two-option pair, or leave questions= out.")
    given = PairSet(checked(pairs), name=getattr(pairs, "name", ""))
    held_out = given.split("report") if "report" in given.splits else given
    if len(held_out) < 2:
        raise ValueError("an interval needs 2 pairs or more, and there is 1 to report on.")
    instructed = _instructed(model, held_out, instruction, chat) if instruction else None
    prompts = listed(datasets.neutral(model) if neutral is None else neutral)
    options: dict[str, Any] = {"at": positions_of(edits), "chat": chat, "plain": outside_blocks(edits)}
    with reporting(progress, "evaluating") as step:
        step(0, 5)
        preferences = Preferences(model, held_out, batch_tokens=batch_tokens, **options)
        doses = {0.0: preferences.base}
        for multiple in MULTIPLES:
            if multiple:
                doses[multiple] = preferences.under(edits_of(model, interventions, multiple))
        curve = steerability(np.stack([doses[m] for m in MULTIPLES]), list(MULTIPLES), seed=seed)
        steered = doses[1.0]
        step(1, 5)
        drawn = _nulls(model, interventions, preferences, nulls, seed)
        step(2, 5)
        reference = Reference(model, prompts, tokens=tokens, batch_tokens=batch_tokens, **options)
        divergence = Divergence.of(reference.per_token(edits))
        step(3, 5)
        own, text = _texts(model, interventions, prompts, max_tokens, chat, seed)
        # A steering that ends every text at once leaves nothing to judge, and everything else still holds.
        said = any(one.tokens for one in text) and any(one.tokens for one in own)
        ratio = perplexity(model, text, batch_tokens) / perplexity(model, own, batch_tokens) if said else float("nan")
        step(4, 5)
        told = Preferences(model, instructed, batch_tokens=batch_tokens).base if instructed else None
        accuracy = None
        if asked_about is not None:
            asked = Preferences(model, asked_about, batch_tokens=batch_tokens, **options)
            accuracy = float((asked.base > 0).mean()), float((asked.under(edits) > 0).mean())
        step(5, 5)
    shift = bootstrap(steered - preferences.base, seed=seed)
    return Evaluation(
        shift=shift,
        base=preferences.base,
        steered=steered,
        curve=curve,
        divergence=divergence,
        perplexity_ratio=ratio,
        own_text=text_statistics([one.tokens for one in own]),
        steered_text=text_statistics([one.tokens for one in text]),
        samples=tuple((_said(model, p), str(a), str(b)) for p, a, b in zip(prompts[:4], own, text, strict=False)),
        nulls=tuple(drawn),
        p_value=null_p_value(shift.value, drawn) if drawn else float("nan"),
        instruction=None if told is None else bootstrap(told - preferences.base, seed=seed),
        over_instruction=None if told is None else paired_difference(steered, told, seed=seed),
        retention=None if accuracy is None or not accuracy[0] else accuracy[1] / accuracy[0],
        accuracy=accuracy,
        record={
            **model.identity,
            "interventions": ", ".join(f"{site.key}: {edit!r}" for site, edit in edits),
            "fingerprints": {site.key: edit.fingerprint for site, edit in edits},
            "lengths": {site.key: _length(edit) for site, edit in edits if isinstance(edit, AddVector)},
            "questions": None if asked_about is None else len(asked_about),
            "pairs": len(held_out),
            "pairs_seen": _seen(edits, vector, held_out),
            "no_nulls_for": (_not_additions(edits) or None) if nulls else None,
            "split": "report" if "report" in given.splits else ", ".join(given.splits) or None,
            "data": given.fingerprint,
            "neutral_prompts": len(prompts),
            "neutral": hashlib.sha256(repr(prompts).encode()).hexdigest()[:16],
            "instruction": instruction,
            "tokens": tokens,
            "max_tokens": max_tokens,
            "seed": seed,
            "mlxsteer": version("mlxsteer"),
            "mlx": version("mlx"),
            "mlx_lm": version("mlx-lm"),
        },
    )


def _seen(
    edits: Sequence[tuple[Site, Intervention]], vector: SteeringVector | None, pairs: Sequence[ContrastPair]
) -> int | str:
    """How many of some pairs the vector, or what the edits know of theirs, was computed from; or ``"unknown"``."""
    told = [part._cache.get(PAIR_HASHES) for _, edit in edits for part in edit.parts()]
    if vector is not None:
        told = [vector.info.get(PAIR_HASHES)]
    known = [hashes for hashes in told if isinstance(hashes, str)]
    seen = pairs_seen(" ".join(known) if known else None, pairs)
    return "unknown" if seen is None else seen


def _not_additions(edits: Sequence[tuple[Site, Intervention]]) -> dict[str, str]:
    """Key → what is done there, where it isn't adding one vector; what only reads does nothing."""
    others = [(site.key, edit) for site, edit in edits if edit.parts() and not isinstance(edit, AddVector)]
    return {key: edit.name or type(edit).__name__ for key, edit in others}


def _length(edit: AddVector) -> float:
    """‖s·v‖, or the largest of several rows'."""
    length: Any = mx.max(mx.linalg.norm(edit.vector.astype(mx.float32), axis=-1)).item()
    return float(length) * float(np.abs(np.array(edit.strength)).max())


def _said(model: InterpretableModel, prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], Mapping):
        return str(prompt[-1].get("content", ""))
    return str(model._needed_tokenizer("a report").decode(list(prompt)))


def _texts(
    model: InterpretableModel, interventions: Mapping[str, Any], prompts: list[Any], max_tokens: int, chat: bool,
    seed: int,
) -> tuple[list[Generation], list[Generation]]:  # fmt: skip
    """Unsteered and steered text of the same prompts, sampled with the same seed."""
    asked = [[{"role": "user", "content": p}] if chat and isinstance(p, str) else p for p in prompts]
    options: dict[str, Any] = {"max_tokens": max_tokens, "temp": 1.0, "seed": seed}
    return model.generate(asked, **options), model.generate(asked, interventions, **options)


def _nulls(
    model: InterpretableModel, interventions: Mapping[str, Any], preferences: Preferences, draws: int, seed: int
) -> list[float]:
    """Mean shifts by random vectors of the same lengths; none where anything else than a vector is added."""
    edits = edits_of(model, interventions)
    if _not_additions(edits):
        return []
    found = []
    for draw in range(draws):
        rng = generator(seed, _NULLS, draw)
        drawn = []
        for site, edit in edits:
            assert isinstance(edit, AddVector)
            random = rng.standard_normal(edit.vector.shape)
            length = np.linalg.norm(np.array(edit.vector.astype(mx.float32)), axis=-1, keepdims=True)
            random *= length / np.linalg.norm(random, axis=-1, keepdims=True)
            drawn.append((site, replace(edit, vector=mx.array(random.astype(np.float32)))))
        found.append(float((preferences.under(drawn) - preferences.base).mean()))
    return found


def _instructed(
    model: InterpretableModel, pairs: Iterable[ContrastPair], instruction: str, chat: bool
) -> list[ContrastPair]:
    """The pairs with the instruction before each prompt.

    Raises:
        ValueError: the model's chat template takes it neither as a system message nor from the user.
    """
    asked = []
    for pair in (as_chat(pair) if chat else pair for pair in pairs):
        if not (pair.messages or pair.chat):
            prompt = f"{instruction} {pair.prompt}".rstrip() if pair.prompt else instruction
            asked.append(replace(pair, prompt=prompt))
            continue
        said = pair.messages or ({"role": "user", "content": pair.prompt},)
        told = replace(pair, prompt="", chat=False, messages=_told(said, instruction))
        try:
            encode_side(model, told, "positive")
        except ValueError:  # some templates have no system message; what else may be wrong is wrong once more
            told = replace(told, messages=_asked(said, instruction))
            encode_side(model, told, "positive")
        asked.append(told)
    return asked


def _told(messages: Sequence[dict[str, str]], instruction: str) -> tuple[dict[str, str], ...]:
    """A conversation with an instruction: behind what its system message says, or as one where there is none."""
    said = [dict(message) for message in messages]
    # Chat templates have room for one such message: of two, some drop one, and others refuse.
    system = next((message for message in said if message["role"] in ("system", "developer")), None)
    if system is None:
        return ({"role": "system", "content": instruction}, *said)
    system["content"] = f"{system['content'].rstrip()}\n\n{instruction}".lstrip()
    return tuple(said)


def _asked(messages: Sequence[dict[str, str]], instruction: str) -> tuple[dict[str, str], ...]:
    """A conversation with an instruction at the head of the user's first message."""
    said = [dict(message) for message in messages]
    for user in [message for message in said if message["role"] == "user"][:1]:
        user["content"] = f"{instruction}\n\n{user['content']}"
    return tuple(said)
