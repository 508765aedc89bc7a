"""Learning an edit by gradient descent through a frozen model: forms, losses, and the loop over minibatches.

What lies before the first edit runs once for each text: the blocks up to the first trained layer, and of the blocks
behind it the tokens before the first edited one. Gradients go through the rest, and through nothing but activations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeAlias

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from mlxsteer.continuation import Continuation, first_edited, shares
from mlxsteer.interventions import AddVector, LowRank
from mlxsteer.interventions.base import Function, Intervention, Where, number
from mlxsteer.interventions.low_rank import low_rank_edit
from mlxsteer.measures.uncertainty import generator
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import ContrastPair, check_seed
from mlxsteer.positions import At, Position
from mlxsteer.questions import check_count, of_pairs
from mlxsteer.sites import Site

Parameters: TypeAlias = "dict[str, mx.array]"
"""What is learned at one layer, by name."""

_ORDER = 20_404
"""Key of the draws that order minibatches, so that they are no one else's."""

# -- forms -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoReFT:
    """``x' = x + Rᵀ(W·x + b − R·x)``, which begins as the identity: W = R, b = 0. Wu et al. 2024, arXiv 2404.03592.

    Attributes:
        rank: r.
        at: which tokens are edited.
    """

    rank: int
    at: At
    name: ClassVar[str] = "loreft"

    def begin(self, states: np.ndarray[Any, Any], rng: np.random.Generator) -> Parameters:
        """Where learning begins: R drawn by chance, (r, D).

        Args:
            states: some activations there, (n, D).
            rng: draws.
        """
        basis = mx.array(random_basis(self.rank, states.shape[1], rng))
        # b is learned in units of the stream's length, which differs a hundredfold between layers and models.
        length = mx.array(float(np.linalg.norm(states, axis=1).mean()))
        return {"basis": basis, "weight": basis, "bias": mx.zeros(self.rank), "length": length}

    def edit(self, p: Parameters, told: list[tuple[mx.array, mx.array]]) -> Intervention:
        """The edit to learn through, staged."""
        return Function(
            lambda x: low_rank_edit(x, p["basis"], p["weight"] - p["basis"], p["length"] * p["bias"]), at=self.at
        )

    def settled(self, p: Parameters) -> Parameters:
        """The same with the rows of R orthonormal again, by QR."""
        return {**p, "basis": mx.array(orthonormal(np.array(p["basis"], np.float64)))}

    def made(self, p: Parameters, gate: float) -> Intervention:
        """What was learned, to steer with."""
        return LowRank(p["basis"], p["weight"], p["length"] * p["bias"], at=self.at)

    def said(self) -> dict[str, Any]:
        """It as data."""
        return {"method": self.name, "rank": self.rank}


@dataclass(frozen=True)
class ReFTr1:
    """``x' = x + mean(top_k ReLU(⟨x, w⟩))·w`` with ‖w‖ = 1. Wu et al. 2025, AxBench, arXiv 2501.17148.

    Attributes:
        at: which tokens are edited, and read by the gate.
        top_k: over how many tokens of a text the gate is averaged.
    """

    at: At
    top_k: int
    name: ClassVar[str] = "reft_r1"

    def begin(self, states: np.ndarray[Any, Any], rng: np.random.Generator) -> Parameters:
        """w drawn by chance, (D,), of the sign with which the gate is open: a closed one has no gradient."""
        drawn = rng.standard_normal(states.shape[1])
        sign = 1.0 if float((states @ drawn).mean()) >= 0 else -1.0
        return {"direction": mx.array((sign * drawn / np.linalg.norm(drawn)).astype(np.float32))}

    def edit(self, p: Parameters, told: list[tuple[mx.array, mx.array]]) -> Intervention:
        """The edit to learn through, staged; it tells each row's gate, and what is below its top k."""
        return _Gated(p["direction"], self.top_k, told, at=self.at)

    def settled(self, p: Parameters) -> Parameters:
        """The same with w of length 1 again."""
        return {"direction": p["direction"] / mx.linalg.norm(p["direction"])}

    def made(self, p: Parameters, gate: float) -> Intervention:
        """What was learned, to steer with: w times the gate's mean over the train texts."""
        return AddVector(p["direction"], gate, at=self.at)

    def said(self) -> dict[str, Any]:
        """It as data."""
        return {"method": self.name, "top_k": self.top_k}


Form: TypeAlias = LoReFT | ReFTr1


@dataclass(frozen=True)
class Schedule:
    """How it is learned.

    Attributes:
        epochs: at most.
        batch: pairs in a step of Adam.
        learning_rate: of the first step; it falls linearly to 0.
        preference: weight of the preference term; 0 leaves the negative sides out.
        sparsity: weight of what of a gate is below its top k.
        patience: so many epochs without a fall of the choosing pairs' loss end it.
        seed: of where it begins, and of the minibatches' order.
    """

    epochs: int
    batch: int
    learning_rate: float
    preference: float
    sparsity: float
    patience: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "patience"):
            check_count(getattr(self, name), name, 1)
        check_seed(self.seed)
        if number(self.learning_rate, "learning_rate") <= 0:
            raise ValueError(f"learning_rate is above 0, not {self.learning_rate:g}.")
        for name in ("preference", "sparsity"):
            if number(getattr(self, name), name) < 0:
                raise ValueError(f"{name} is a weight of 0 or more, not {getattr(self, name):g}.")

    def said(self) -> dict[str, Any]:
        """It as data."""
        return asdict(self)


@dataclass(frozen=True, eq=False, repr=False)
class _Gated(Intervention):
    """ReFT-r1 as it is trained: its gate looks at all of a text, so that it steers no text that is still being made."""

    direction: Any
    top_k: int
    told: list[tuple[mx.array, mx.array]]
    strength: Any = 1.0
    name: ClassVar[str] = "reft_r1"
    saveable: ClassVar[bool] = False

    def formula(self, x: mx.array, strength: float | mx.array, where: Where) -> mx.array:
        wide = x.astype(mx.float32)
        acts = mx.maximum(wide @ self.direction, 0)
        marks = np.stack([where.tokens.marks(row, self.at) for row in range(len(where.tokens))])
        acts = acts * mx.array(marks)  # padding counts as a gate that is closed
        count = mx.array(np.maximum(marks.sum(axis=1), 1).astype(np.float32))
        k = min(self.top_k, acts.shape[1])
        top = mx.topk(acts, k, axis=-1).sum(axis=-1)
        gate = top / mx.minimum(count, k)
        self.told.append((gate, (acts.sum(axis=-1) - top) / count))
        return wide + strength * gate[:, None, None] * self.direction


def random_basis(rank: int, width: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Orthonormal rows drawn by chance, (rank, width) float32."""
    return orthonormal(rng.standard_normal((rank, width)))


def orthonormal(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The rows made orthonormal one after the other, each on the side where it was, (r, D) float32."""
    q, r = np.linalg.qr(rows.T)
    found: np.ndarray[Any, Any] = (q * np.where(np.diag(r) < 0, -1.0, 1.0)).T.astype(np.float32)
    return found


# -- losses ----------------------------------------------------------------------------------------------------------


class Minibatch:
    """A few pairs, and what all steps over them go on from.

    Args:
        model: the model.
        pairs: the pairs.
        form: what is learned.
        layers: where.
        preference: whether the negative sides are looked at, too.
    """

    def __init__(
        self, model: InterpretableModel, pairs: Sequence[ContrastPair], form: Form, layers: Sequence[int],
        *, preference: bool,
    ) -> None:  # fmt: skip
        question = of_pairs(model, pairs, None)
        count = len(pairs) * (1 + preference)
        texts, needed = question.texts[:count], question.needed[:count]
        self.one = Continuation(model, texts, needed, Position.of(form.at), pairs=preference)
        self.one.narrow(min(layers))
        self.form, self.pairs, self.preference = form, len(pairs), preference
        self.places: dict[str, Site] = {str(layer): model._sites.resolve(f"layers.{layer}") for layer in layers}
        ends = [(text.tokens[p + 1], row) for row, text in enumerate(texts) for p in needed[row]]
        targets, rows = (np.array(column, np.int32) for column in zip(*ends, strict=True))
        self.targets = mx.array(targets)[:, None]
        self.rows = mx.array((rows == np.arange(count)[:, None]).astype(np.float32))
        self.tokens = int((rows < len(pairs)).sum())

    def terms(self, parameters: Mapping[str, Parameters]) -> mx.array:
        """Staged sums over the pairs, (3,): −log P(positive); −log σ(log P(positive) − log P(negative)); and what of a
        gate is below its top k."""
        told: list[tuple[mx.array, mx.array]] = []
        logits = self.one.logits(self._edits(parameters, told))
        each = mx.take_along_axis(logits, self.targets, axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)
        sums = self.rows @ each
        positive = sums[: self.pairs]
        zero = mx.array(0.0)
        preferred = mx.logaddexp(zero, sums[self.pairs :] - positive).sum() if self.preference else zero
        below = sum((rest[: self.pairs].sum() for _, rest in told), start=zero)
        return mx.stack([-positive.sum(), preferred, below])

    def gates(self, parameters: Mapping[str, Parameters]) -> dict[str, mx.array]:
        """Staged: layer → the gate of each positive text, (pairs,); nothing without gates."""
        told: list[tuple[mx.array, mx.array]] = []
        logits = self.one.logits(self._edits(parameters, told))
        mx.eval(logits, told)
        return dict(zip(self.places, (gate[: self.pairs] for gate, _ in told), strict=False))

    def _edits(
        self, parameters: Mapping[str, Parameters], told: list[tuple[mx.array, mx.array]]
    ) -> list[tuple[Site, Intervention]]:
        return [(site, self.form.edit(parameters[layer], told)) for layer, site in self.places.items()]


def minibatches(
    model: InterpretableModel, pairs: Sequence[ContrastPair], form: Form, layers: Sequence[int], how: Schedule
) -> list[Minibatch]:
    """The pairs in batches of nearly one length: those whose first edited tokens lie together share what runs once.

    One pair at a time in families whose rows differ in a batch.

    Raises:
        ValueError: there is nothing to score, or both sides of a pair can't run in one batch.
    """
    preference, batches = how.preference > 0, model._sites.family.batch
    if preference and not batches:
        raise ValueError(
            f"preference={how.preference:g} runs both sides of a pair in one batch, and the rows of "
            f"{model._sites.model_type} models differ there: leave it out."
        )
    position = Position.of(form.at)
    question = of_pairs(model, pairs, None)
    ends = [needed.stop for needed in question.needed[: len(pairs)]]
    firsts = [0] * len(pairs)
    if shares(model):
        texts = zip(question.texts[: len(pairs)], question.needed, strict=False)
        firsts = [first_edited(model, *one, position) for one in texts]
    order = sorted(range(len(pairs)), key=lambda i: (firsts[i], ends[i]))
    size = how.batch if batches else 1
    groups = [order[begin : begin + size] for begin in range(0, len(order), size)]
    return [Minibatch(model, [pairs[i] for i in one], form, layers, preference=preference) for one in groups]


# -- the loop --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """What came of it.

    Attributes:
        parameters: layer → what was learned there, of the epoch with the least loss on the choosing pairs.
        losses: loss of each epoch over the train pairs, while they were learned from.
        choose: loss on the choosing pairs, before the first epoch and after each.
        gates: layer → the gate's mean over the train texts; empty without gates.
    """

    parameters: dict[str, Parameters]
    losses: tuple[float, ...]
    choose: tuple[float, ...]
    gates: dict[str, float]

    @property
    def best(self) -> int:
        """After which epoch the choosing pairs' loss was least; 0 for before the first."""
        return int(np.argmin(self.choose))


def learned(
    batches: Sequence[Minibatch], choosing: Sequence[Minibatch], begin: dict[str, Parameters], how: Schedule,
    step: Callable[[int], None],
) -> Learned:  # fmt: skip
    """Adam with a learning rate that falls linearly to 0; it ends early when the choosing pairs' loss does not fall.

    Args:
        batches, choosing: train pairs, and those that say when to end.
        begin: layer → parameters.
        how: epochs, rates and weights.
        step: called with the number of steps done.

    Raises:
        ValueError: the loss is NaN or infinite.
    """
    form, count = batches[0].form, len(batches)

    def weights(some: Sequence[Minibatch]) -> mx.array:
        pairs = sum(one.pairs for one in some)
        return mx.array([1 / sum(one.tokens for one in some), how.preference / pairs, how.sparsity / pairs])

    def loss(parameters: dict[str, Parameters], one: Minibatch) -> mx.array:
        return (one.terms(parameters) * weights([one])).sum()

    def held(parameters: dict[str, Parameters]) -> float:
        total = functools.reduce(lambda sums, one: _evaluated(sums + one.terms(parameters)), choosing, mx.zeros(3))
        return _finite((total * weights(choosing)).sum(), "on the choosing pairs")

    optimizer: Any = optim.Adam(optim.linear_schedule(how.learning_rate, 0.0, how.epochs * count), bias_correction=True)
    descend = mx.value_and_grad(loss)
    parameters, best = begin, begin
    losses: list[float] = []
    choose = [held(parameters)]
    for epoch in range(how.epochs):
        found: list[float] = []
        for i in generator(how.seed, _ORDER, epoch).permutation(count).tolist():
            value, gradients = descend(parameters, batches[i])
            for own in gradients.values():
                own.pop("length", None)  # a unit, which is not learned
            moved = optimizer.apply_gradients(gradients, parameters)
            mx.eval(value, moved, optimizer.state)
            done = epoch * count + len(found) + 1
            found.append(_finite(value, f"in step {done}, at learning_rate={how.learning_rate:g}"))
            parameters = {layer: form.settled({**parameters[layer], **own}) for layer, own in moved.items()}
            step(done)
        losses.append(float(np.mean(found)))
        choose.append(held(parameters))
        if choose[-1] < min(choose[:-1]):  # as `Learned.best` counts: the first of equal ones
            best = parameters
        elif len(choose) - 1 - int(np.argmin(choose)) >= how.patience:
            break
    gates: dict[str, list[float]] = {}
    for one in batches:
        for layer, gate in one.gates(best).items():
            gates.setdefault(layer, []).extend(np.array(gate).tolist())
    return Learned(best, tuple(losses), tuple(choose), {layer: float(np.mean(all_)) for layer, all_ in gates.items()})


def _evaluated(x: mx.array) -> mx.array:
    mx.eval(x)
    return x


def _finite(value: mx.array, where: str) -> float:
    found = float(np.array(value))
    if not np.isfinite(found):
        raise ValueError(f"the loss became {found} {where}: a smaller learning_rate may keep it finite.")
    return found
