"""What a command is given to steer with: a vector, a contrast set to compute one from, or a file of interventions."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import mlx.core as mx

from mlxsteer import datasets
from mlxsteer import interventions as iv
from mlxsteer.extraction import extract
from mlxsteer.interventions.base import Compose, Intervention, as_intervention
from mlxsteer.interventions.files import FORMAT
from mlxsteer.interventions.gates import When
from mlxsteer.interventions.operators import AddSequence, AddVector
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import PAIR_HASHES, PairSet, in_split, nearest
from mlxsteer.positions import NAMES, At
from mlxsteer.recommended import recommended
from mlxsteer.refusal import RefusalDirection
from mlxsteer.steering import Steering
from mlxsteer.vectors import SteeringVector

Source: TypeAlias = "SteeringVector | PairSet | dict[str, Intervention]"
"""What a steering is made of: a vector, the pairs to compute one from, or a file of interventions."""

ENOUGH = 80
"""A vector is computed from so many pairs of a contrast set: from here on it is usually reliable."""


def opened(name: str, model: str) -> Source:
    """What a file holds, or a bundled contrast set, of which the bundled model has some in its own language."""
    path, sets = Path(name).expanduser(), datasets.available()
    own = f"pocket/{name}" if model == "pocket" and f"pocket/{name}" in sets else name
    if not path.exists() and own in sets:
        return datasets.load(own)
    if not path.exists():
        try:
            return vector_of(name)
        except (FileNotFoundError, ConnectionError) as error:
            near = difflib.get_close_matches(name.casefold(), sets_for(model), n=3)
            more = f" Nearest contrast sets: {', '.join(near)}." if near else " mlxsteer datasets lists contrast sets."
            raise type(error)(f"{error}{more}") from error
    told = _told(path) if path.suffix == ".json" else {}
    if "ablation" in told:
        return RefusalDirection.from_json(path).ablation
    if "messages" in told:
        raise ValueError(f"{path} is a saved conversation, not a steering: what steers is saved as .safetensors.")
    metadata: Any = {}
    with suppress(RuntimeError, ValueError):  # of what is damaged, the vector's own reader says what it is
        metadata = mx.load(str(path), return_metadata=True)[1] if path.suffix == ".safetensors" else {}  # type: ignore[index]
    return iv.load(path) if FORMAT in metadata else SteeringVector.load(path)


def vector_of(name: str) -> SteeringVector:
    """The vector of a file or repository; what isn't there was more likely meant as a file.

    Raises:
        FileNotFoundError: there is none of this name.
        ConnectionError: there is no such file, and the Hub can't be reached.
    """
    try:
        return SteeringVector.load(name)
    except (FileNotFoundError, ConnectionError) as error:
        _, asked, why = str(error).partition("which is no path here: ")
        if not asked:
            raise
        raise type(error)(f"there is no file or folder {name} here. As a repository, user/repo: {why}") from error


def sets_for(model: str) -> list[str]:
    """The contrast sets as they are typed: those of the bundled model's own language without their folder, for it."""
    own = [name.removeprefix("pocket/") for name in datasets.available() if name.startswith("pocket/")]
    return list(dict.fromkeys([*own * (model == "pocket"), *datasets.available()]))


def _told(path: Path) -> dict[str, Any]:
    """What a JSON file holds, where it is a dict, as those of a conversation and of a refusal direction."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _each(one: Intervention, by: float = 1.0, gate: str = "") -> Iterator[tuple[Intervention, float, str]]:
    """The elementary interventions in one, each with the strength at which it acts, and what has to hold for it."""
    by *= float(one.strength)
    if isinstance(one, When):
        yield from _each(one.then, by, f"{gate}, when {one.condition} (per {one.per})")
    elif isinstance(one, Compose):
        for step in one.steps:
            yield from _each(step, by, gate)
    else:
        yield one, by, gate


def _times(one: Intervention, by: float) -> Intervention:
    """One so many times as strong; an addition stays one, which `evaluate` draws random vectors for."""
    if not isinstance(one, AddVector) or not isinstance(one.strength, float):
        return Compose((one,), by)
    scaled = replace(one, strength=one.strength * by)
    scaled._cache[PAIR_HASHES] = one._cache.get(PAIR_HASHES)  # what it was computed from stays known
    return scaled


def position(text: str) -> At:
    """A position as it is typed: a name, indices such as ``-1`` or ``0,1``, or a slice such as ``2:5``.

    Raises:
        ValueError: it is none of these.
    """
    if text in NAMES:
        return text
    number = "-?[0-9]{1,9}"
    if re.fullmatch(f"{number}(,{number})*", text):
        indices = [int(index) for index in text.split(",")]
        return indices if len(indices) > 1 else indices[0]
    if re.fullmatch(f"({number})?:({number})?", text):
        return slice(*(int(end) if end else None for end in text.split(":")))
    raise ValueError(f"a position is a name, or like -1 or 0,1 or 2:5, not {text!r}. {nearest(text, NAMES, '/help')}")


def written(at: At) -> str:
    """A position as `position` reads it, where it is a slice."""
    if not isinstance(at, slice):
        return repr(at)
    ends = [at.start, at.stop] if at.step in (None, 1) else [at.start, at.stop, at.step]
    return ":".join("" if end is None else str(end) for end in ends)


@dataclass(frozen=True)
class Named:
    """A steering as a command is told it: what was loaded, and how it acts.

    Attributes:
        source: a vector, or interventions by key, which say themselves where they act.
        layers: where a vector acts.
        at: on which tokens a vector acts.
        unit: of a vector's strength.
        strength: 0 is plain; multiplies the vector, or the strengths in the file.
        on: whether it acts.
    """

    source: SteeringVector | dict[str, Intervention]
    layers: tuple[int, ...] = ()
    strength: float = 1.0
    on: bool = True
    at: At = "all"
    unit: Literal["raw", "residual"] = "raw"

    def interventions(self) -> dict[str, Intervention]:
        """The key dict that does it."""
        if isinstance(self.source, SteeringVector):
            return self.source.at(self.layers, self.strength, self.at, unit=self.unit)
        if self.strength == 1:  # as they are, so that whoever asks what is done sees it, and not a composition of one
            return {key: as_intervention(one) for key, one in self.source.items()}
        return {key: _times(one, self.strength) for key, one in self.source.items()}

    def acts(self) -> Iterator[tuple[str, str, float, str]]:
        """Key, kind and strength of everything in it, and its tokens in words."""
        for key, one in self.interventions().items():
            for part, strength, gate in _each(one):
                when = f", {part.schedule}" if part.schedule is not None else ""
                spans = f", not {part.exclude}" if part.exclude is not None else ""
                yield key, part.name, strength, f"{written(part.at.written())}{when}{spans}{gate}"

    def __str__(self) -> str:
        told = "; ".join(self.words())
        return told if self.on else f"{told} (off)"

    def words(self) -> Iterator[str]:
        """What `acts` says, in words; what is alike at several places, once."""
        alike: dict[str, list[str]] = {}
        for key, kind, strength, where in self.acts():
            alike.setdefault(f"{kind} at {{}}, strength {self.amount(kind, strength)}, tokens {where}", []).append(key)
        for said, keys in alike.items():
            layers = [key.removeprefix("layers.") for key in keys]
            blocks = len(keys) > 1 and all(map(str.isdecimal, layers))
            yield said.replace("{}", f"layers {', '.join(layers)}" if blocks else ", ".join(keys), 1)

    def amount(self, kind: str, strength: float) -> str:
        """A strength with its unit, where it is of a vector."""
        if kind not in (AddVector.name, AddSequence.name):
            return f"{strength:g}"
        return f"{strength:g} {'residual norms' if self.unit == 'residual' else '× the vector'}"

    @classmethod
    def made(
        cls,
        model: InterpretableModel,
        source: Source,
        layers: Sequence[int] = (),
        strength: float | None = None,
        at: At = "all",
        unit: Literal["raw", "residual"] = "raw",
        progress: Any = True,
    ) -> Named:
        """A steering of a model, checked.

        Args:
            model: what it is to steer.
            source: a vector; the pairs to compute one from; or interventions by key.
            layers: where a vector acts: unless told, where its pairs were measured to steer best, or in its middle.
            strength: 1, unless told.
            at: the tokens that a vector acts on.
            unit: of the strength of a vector.
            progress: of the extraction.

        Raises:
            ValueError: it is another model's, or has strengths for several rows.
            KeyError: the vector lacks a layer, or the model a place.
        """
        if isinstance(source, PairSet):
            layers = layers or _best_layer(model, source)
            source = extract(model, in_split(source, "train")[:ENOUGH], progress=progress)
        if isinstance(source, SteeringVector):
            source.check(model)
            layers = layers or (source.layers[len(source) // 2],)
        return cls(source, tuple(layers), 1.0 if strength is None else strength, at=at, unit=unit).checked(model)

    def checked(self, model: InterpretableModel) -> Named:
        """The same, unless it doesn't fit the model."""
        does = self.interventions()
        Steering.of(model._sites, does)  # refuses what doesn't fit the model
        if any(part.strengths is not None for each in does.values() for part in each.parts()):
            raise ValueError("it has one strength per row of a batch, and this is a single row.")
        return self


def _best_layer(model: InterpretableModel, pairs: PairSet) -> tuple[int, ...]:
    # Only the layer is taken: the strength that is recommended belongs to the tokens that it was measured at, and
    # garbles answers that are steered at all of theirs.
    with suppress(LookupError):
        strengths = recommended(model, pairs.name).strengths
        return (max(strengths, key=lambda layer: abs(strengths[layer])),)
    return ()


def sources_of(names: Sequence[str], layers: Sequence[int], at: str | None, unit: str, model: str) -> dict[str, Source]:
    """What the command line names, by name; read before the model is, so that a wrong name costs no time."""
    made: dict[str, Source] = {}
    for name in names:
        stem = Path(name).stem
        if stem in made:
            raise ValueError(f"two of what steers are called {stem}: rename one, since they are told apart by name.")
        made[stem] = opened(name, model)
    check_places(zip(names, made.values(), strict=True), layers, at, unit)
    return made


def check_places(sources: Iterable[tuple[str, Source]], layers: Sequence[int], at: str | None, unit: str) -> None:
    """Refuse options that say how a vector acts where none is named that would hear them.

    Raises:
        ValueError: with the option, or the layer that a vector lacks.
    """
    sources = list(sources)
    for name, source in sources:
        for layer in layers:
            if isinstance(source, SteeringVector) and layer not in source.layers:
                raise ValueError(f"--layer {layer}: {name} has no direction there; it has {source.layers}.")
    if all(isinstance(source, dict) for _, source in sources):
        given = {"--layer": ",".join(map(str, layers)), "--at": at, "--unit": None if unit == "raw" else unit}
        for option, value in given.items():
            if value:
                told = "; interventions say it themselves" if sources else ""
                told += (
                    f" (mlxsteer select --at {value} makes some that act there)" if told and option == "--at" else ""
                )
                raise ValueError(f"{option} {value} says how a vector acts: name one by --steer{told}.")


def together(model: InterpretableModel, steerings: Iterable[Named]) -> dict[str, Intervention]:
    """All that acts, as one key dict, in order; empty where nothing does."""
    made: dict[str, Intervention] = {}
    for one in steerings:
        for pattern, does in one.interventions().items() if one.on and one.strength else ():
            for key in model.sites(pattern):  # one spelling for each place, so that the order is kept there
                made[key] = made[key] | does if key in made else does
    return made
