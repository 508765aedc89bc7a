"""Linear probes: whether a behaviour is readable at each layer, and how to watch for it in prompts and in streams."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlxsteer.display import written_table
from mlxsteer.hooks import attached
from mlxsteer.interventions.base import number
from mlxsteer.interventions.conditions import Compared, projection
from mlxsteer.interventions.files import as_json, read_tensors, write_whole
from mlxsteer.measures.detection import sigmoid
from mlxsteer.measures.uncertainty import Interval
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import counted
from mlxsteer.plans import Plan
from mlxsteer.reading import Read, activations
from mlxsteer.token_readings import Reader, Watching, pieces_by
from mlxsteer.trace import Trace
from mlxsteer.vectors import SteeringVector

Array = np.ndarray[Any, Any]

FORMAT = "mlxsteer.probe"
VERSION = 1


@dataclass(frozen=True, eq=False)
class LayerProbe:
    """The probe of one layer: a text's score is ``w·x + b``, with x its activation, and its probability ``σ(a·s + c)``.

    Attributes:
        direction: w, (D,) float32.
        intercept: b.
        auroc: of the report split, which neither the fit nor a choice has seen, with its 95 % interval.
        chosen_by: the AUROC on the choose split, by which layers are compared.
        threshold: on the score; chosen on the choose split.
        slope, offset: Platt's a and c, fitted to the choose split.
        balanced_accuracy, f1: of the report split, at the threshold.
        brier: mean squared error of the probabilities on the report split; 0.25 is that of saying one half.
        gap: mean score of the positive side less that of the negative, on the train split.
        p: how likely permuted labels of the report split give as high an AUROC, for this layer alone; None without.
        chance: between which AUROCs 95 % of the permutations lie; None without.
    """

    direction: mx.array
    intercept: float
    auroc: Interval
    chosen_by: float
    threshold: float
    slope: float
    offset: float
    balanced_accuracy: float
    f1: float
    brier: float
    gap: float
    p: float | None = None
    chance: tuple[float, float] | None = None

    def scores(self, x: Any) -> mx.array:
        """``w·x + b`` of activations (..., D): (...), float32, staged."""
        return mx.array(x).astype(mx.float32) @ self.direction + self.intercept

    def probabilities(self, scores: Any) -> Array:
        """``σ(a·s + c)`` of scores, in their shape: how likely a text with such a score is of the positive side, where
        both sides are as frequent as in the choose split."""
        return sigmoid(self.slope * np.asarray(scores, np.float64) + self.offset)


@dataclass(frozen=True, eq=False)
class Probe:
    """Linear probes of several layers, with what they were seen to do on texts that they weren't fitted to.

    Attributes:
        layers: layer → its probe.
        best: the layer with the highest AUROC on the choose split; of equals the one whose sides lie furthest apart.
        site: the key they read, with ``{layer}`` in place of the number.
        method: ``"logistic"``, ``"lda"`` or ``"mean_difference"``.
        residual_norms: layer → median norm of the activation there.
        warnings: what speaks against relying on it, in words.
        info: where it comes from: model, data, splits, settings.
    """

    layers: dict[int, LayerProbe]
    best: int
    site: str = "layers.{layer}"
    method: str = "logistic"
    residual_norms: dict[int, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, layer: int) -> LayerProbe:
        if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)) or layer not in self.layers:
            raise KeyError(f"the probe has no layer {layer!r}; it has {list(self.layers)}.")
        return self.layers[layer]

    def __repr__(self) -> str:
        warned = f", {counted(len(self.warnings), 'warning')}" if self.warnings else ""
        layers = counted(len(self.layers), "layer")
        return f"Probe({self.method}, {layers}, best {self.best}: AUROC {area_of(self[self.best])}{warned})"

    def key(self, layer: int | None = None) -> str:
        """The key of the place that a layer's probe reads; of the best layer, unless told."""
        return self.site.replace("{layer}", str(self._layer(layer)))

    def _layer(self, layer: int | None) -> int:
        layer = self.best if layer is None else layer
        self[layer]
        return int(layer)

    # -- what it says ------------------------------------------------------------------------------------------------

    def read(
        self, model: InterpretableModel | Trace, prompt: Any = None, interventions: Any = None, *,
        layer: int | None = None,
    ) -> Any:  # fmt: skip
        """A score and a probability for each token of a prompt.

        The probe was fitted and calibrated to what ``read=`` said, one reading of each text; what it says of other
        tokens is the same formula, and as good as those tokens are like these.

        Args:
            model: the model; or a trace, alone.
            prompt: a text, token ids or chat messages; several are run as one batch.
            interventions: key → intervention, in force while the prompt runs.
            layer: which layer's probe; None for the best.

        Returns:
            `TokenReadings`, or a list of them for several prompts.

        Raises:
            TypeError: no model and no trace.
            KeyError: there is no such layer.
            ValueError: the probe is another model's.
        """
        if isinstance(model, InterpretableModel):
            self.check(model)
        return self._reader(layer).read_all(model, prompt, interventions)

    def predict(
        self, model: InterpretableModel, texts: Iterable[Any], *, layer: int | None = None, read: Read | None = None,
        chat: bool = False, batch_tokens: int = 4096,
    ) -> Array:  # fmt: skip
        """How likely each of some texts is of the positive side, (texts,), read as those that the probe was fitted to.

        Args:
            model: the model.
            texts: texts, lists of token ids, or chats, all of them prompt.
            layer: which layer's probe; None for the best.
            read: which token; None for what the probe was fitted to, and ``"all"`` where that was the mean of
                completions, of which these texts have none.
            chat: texts are a user's messages.
            batch_tokens: the most tokens in one batch.

        Raises:
            ValueError: the probe is another model's, or reads a completion's first token, which these texts don't have,
                or by a callable, which has to be given again.
        """
        self.check(model)
        told = self.info.get("read", "last") if read is None else read
        if read is None and told == "first":
            raise ValueError(
                "the probe was fitted to the first token of completions, and these texts are all prompt: say which "
                "token to read, such as read='last'."
            )
        told = "all" if read is None and told == "mean" else told
        if read is None and isinstance(told, str) and told not in ("last", "all"):
            raise ValueError(f"the probe was fitted to what a function, {told}, reads: give it again, read=.")
        one, key = self[self._layer(layer)], self.key(layer)
        rows = activations(model, texts, key, read=told, chat=chat, batch_tokens=batch_tokens)
        return one.probabilities(one.scores(next(iter(rows.values()))))

    @contextmanager
    def watch(self, model: InterpretableModel, *, layer: int | None = None) -> Iterator[Watching]:
        """Read each token while texts are generated, steered or not.

        The reading is that of what the model goes on with, behind every steering at that place. The device computes it
        with the step, and nothing waits for it: look at it whenever you like.

        Args:
            model: the model.
            layer: which layer's probe; None for the best.

        Returns:
            A context manager that gives a `Watching`: inside the block, `latest` is the newest token's score;
            ``list(watching)`` holds `TokenReadings` for each sequence, and ``watching.of(text)`` those of one.

        Raises:
            TypeError, ValueError: no model, or the probe is another model's.
            KeyError: there is no such layer.
            NeverFired: on leaving: no forward ran.
        """
        self.check(model)
        reader = self._reader(layer)
        site = model._sites.resolve(reader.key)
        seen = Watching(site, reader, pieces_by(model))
        plan = Plan(model._sites, capture=[site], keep=seen.keep, follow=True)
        with attached(plan):
            yield seen
        plan.check_fired()

    def _reader(self, layer: int | None) -> Reader:
        one = self[self._layer(layer)]
        return Reader(self.key(layer), "score", one.scores, one.probabilities, one.threshold)

    def condition(
        self, layer: int | None = None, *, probability: float | None = None, read: Literal["last", "mean"] = "last"
    ) -> Compared:
        """A gate's condition: the probe is past its threshold. ``iv.when(probe.condition(), iv.add_vector(v))``.

        ``w·x + b > t`` is ``⟨x, w⟩/‖w‖ > (t − b)/‖w‖``, a `projection`. It combines by ``&``, ``|`` and ``~``, and is
        saved with the gate. The gate acts at the probe's layer or behind it.

        Args:
            layer: which layer's probe; None for the best.
            probability: open where the calibrated probability is above this, in place of the chosen threshold.
            read: of a prompt, its last token or the mean of its activations; a gate with ``per="token"`` asks every
                token, and takes ``"last"``.

        Raises:
            KeyError: there is no such layer.
            ValueError: the probability isn't between 0 and 1, or the probe's doesn't grow with its score.
        """
        one = self[self._layer(layer)]
        threshold = one.threshold
        if probability is not None:
            p = number(probability, "probability")
            if not 0 < p < 1:
                raise ValueError(f"probability is between 0 and 1, not {p}.")
            if one.slope <= 0:
                raise ValueError("the probe's probability doesn't grow with its score: it tells nothing apart.")
            threshold = (math.log(p / (1 - p)) - one.offset) / one.slope
        length = float(np.linalg.norm(np.array(one.direction, np.float64)))
        return projection(one.direction, key=self.key(layer), read=read) > (threshold - one.intercept) / length

    def vector(self) -> SteeringVector:
        """The directions as a steering vector: ``v = ⟨μ₊ − μ₋, ŵ⟩ ŵ``, the sides' mean difference along each w.

        What detects a behaviour well need not bring it about: of the methods of AxBench (Wu et al. 2025, arXiv
        2501.17148) the linear probe is among the best detectors (mean AUROC .940) and the worst steerers (.098, against
        .239 of the mean difference). To steer, take `extract`; this is for comparing and for ablating.
        """
        directions = {}
        for layer, one in self.layers.items():
            w = np.array(one.direction, np.float64)
            directions[layer] = (w * one.gap / (w @ w)).astype(np.float32)
        note = "a probe's direction, which detects better than it steers (arXiv 2501.17148)"
        return SteeringVector(directions, self.site, self.residual_norms, {**self.info, "note": note})  # type: ignore[arg-type]

    # -- evidence ------------------------------------------------------------------------------------------------------

    def table(self) -> str:
        """The layers and the warnings, in plain text."""
        rows = []
        for layer, one in self.layers.items():
            chance = "" if one.chance is None else f"{one.chance[0]:.2f} to {one.chance[1]:.2f}"
            rows.append((f"{'* ' if layer == self.best else ''}{layer}", f"{one.chosen_by:.3f}", area_of(one), chance,
                         "" if one.p is None else f"{one.p:.3f}", f"{one.balanced_accuracy:.2f}", f"{one.f1:.2f}",
                         f"{one.brier:.3f}"))  # fmt: skip
        heads = ("layer", "choose", "AUROC, 95 % interval", "chance", "p", "bal. acc.", "F1", "Brier")
        table = written_table(f"{self.method} probes, held-out {self._held()}", heads, rows)
        return "\n".join([table, *(f"Warning: {warning}" for warning in self.warnings)])

    def _held(self) -> str:
        return str(self.info.get("report", "texts"))

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything but the directions as JSON; with a path, also written there, whole or not at all."""
        return as_json(self._data(), path)

    def plot(self, path: str | Path | None = None) -> Any:
        """AUROC by layer with its interval, and the band of chance; a matplotlib figure.

        Args:
            path: also write it there, as PNG, PDF or SVG by suffix.
        """
        from mlxsteer.plots import plot_probe

        return plot_probe(self, path)

    # -- files ---------------------------------------------------------------------------------------------------------

    def check(self, model: InterpretableModel) -> None:
        """Whether the probe belongs to a model.

        Raises:
            TypeError: it is no model.
            ValueError: the model has another width, or other layers.
            UnknownKey: the model has no such site.

        Warns:
            VectorMismatchWarning: the probe was fitted to another model, or under another quantization.
        """
        self._as_vector._check(model, stacklevel=4, what="the probe")

    @property
    def _as_vector(self) -> SteeringVector:
        return SteeringVector({n: one.direction for n, one in self.layers.items()}, self.site, info=self.info)

    def _data(self) -> dict[str, Any]:
        layers = {}
        for layer, one in self.layers.items():
            told = {f.name: getattr(one, f.name) for f in fields(one) if f.name != "direction"}
            area = one.auroc
            layers[str(layer)] = {**told, "auroc": [area.value, area.low, area.high, area.level]}
        return {"version": VERSION, "site": self.site, "method": self.method, "best": self.best, "layers": layers,
                "residual_norms": {str(n): norm for n, norm in self.residual_norms.items()},
                "warnings": list(self.warnings), "info": self.info}  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Write the probe as one safetensors file, whole or not at all.

        Raises:
            ValueError: the name doesn't end in ``.safetensors``.
        """
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"{path}: a probe is saved as a .safetensors file.")
        tensors = {f"layers.{layer}": one.direction for layer, one in self.layers.items()}
        metadata = {FORMAT: json.dumps(self._data())}
        return write_whole(path, lambda temporary: mx.save_safetensors(temporary, tensors, metadata))

    @classmethod
    def load(cls, path: str | Path, *, model: InterpretableModel | None = None) -> Probe:
        """Read what `save` wrote. Nothing is unpickled.

        Args:
            path: the file.
            model: the model that it is for, to `check` that it belongs to it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, foreign, or of a later version; or of another model than the one given.
        """
        tensors, data = read_tensors(path, FORMAT, VERSION)
        try:
            layers = {}
            for name, told in data["layers"].items():
                chance = None if told["chance"] is None else (float(told["chance"][0]), float(told["chance"][1]))
                numbers = {f.name: told[f.name] for f in fields(LayerProbe) if f.name != "direction"}
                numbers |= {"auroc": Interval(*told["auroc"]), "chance": chance}
                layers[int(name)] = LayerProbe(tensors[f"layers.{name}"], **numbers)
            norms = {int(layer): float(norm) for layer, norm in data["residual_norms"].items()}
            found = cls(
                layers, data["best"], data["site"], data["method"], norms, tuple(data["warnings"]), data["info"]
            )
            _ = found[found.best], found._as_vector  # its layers fit together
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: the probe in it is damaged ({str(error).rstrip('.')}).") from error
        if model is not None:
            found.check(model)
        return found


def area_of(one: LayerProbe) -> str:
    """A layer's AUROC and its interval, in words."""
    return f"{one.auroc.value:.3f} [{one.auroc.low:.3f}, {one.auroc.high:.3f}]"
