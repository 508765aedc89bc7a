"""Whether a model is hooked as its names say: found, run once, of one width, a cause of the logits, replayable.

In the spirit of nnterp (Dumas et al. 2025), names are checked by running the model, on a few tokens: what a name is
believed to mean is held against what the forward does.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlxsteer.forks import forkable
from mlxsteer.hooks import activation, attached, detached
from mlxsteer.interventions.base import Function
from mlxsteer.plans import NeverFired, Plan
from mlxsteer.positions import Prompt, Tokens
from mlxsteer.sites import Site, SiteMap

TOKENS = 4
"""How many tokens the forwards of a check see."""


@dataclass(frozen=True)
class Finding:
    """What one part of a check found.

    Attributes:
        what: ``"names"``, ``"firings"``, ``"shapes"``, ``"cause"``, ``"inputs"``, ``"replay"`` or ``"batch"``.
        fine: whether steering is what it says; what it does in a plainer way is fine.
        says: a sentence.
    """

    what: str
    fine: bool
    says: str


@dataclass(frozen=True)
class Report:
    """What `check` found of a model.

    Attributes:
        model: what it is, in words.
        findings: one for each part, in order.
    """

    model: str
    findings: tuple[Finding, ...]

    @property
    def fine(self) -> bool:
        """Whether every part is."""
        return all(finding.fine for finding in self.findings)

    def __str__(self) -> str:
        rows = [f"{'ok   ' if f.fine else 'WRONG'}  {f.what:<8} {f.says}" for f in self.findings]
        return "\n".join([self.model, *rows])


def check(sites: SiteMap) -> Report:
    """Run a model on four tokens, plain and changed at a few places, and say whether its names hold.

    The model stays as it is; steering that is in force doesn't act here.

    Args:
        sites: the model's names.

    Returns:
        A `Report`; it never raises for what it finds.
    """
    with detached(residents=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forwards = _Forwards(sites)
        findings = [_names(sites)]
        for part in (_firings, _shapes, _cause, _inputs, _replay):
            try:
                findings.append(part(forwards))
                if part is _firings and not findings[-1].fine:
                    break  # what doesn't run can't be looked at
            except (NeverFired, TypeError, ValueError, RuntimeError, AttributeError) as error:
                findings.append(
                    Finding(part.__name__.strip("_"), False, f"{type(error).__name__}: {str(error).rstrip('.')}")
                )
                break
        findings.append(_batch(sites))
    file = type(sites.model).__module__.rsplit(".", 1)[-1]
    kind = sites.model_type or type(sites.model).__name__
    known = "" if kind == file else f", built from {file}"
    return Report(f"{kind}{known}: {len(sites.blocks)} blocks in {sites.container}", tuple(findings))


class UncheckedModel(UserWarning):
    """A model of an architecture that the tests don't know, of which a check found that not all names hold."""


def check_unknown(sites: SiteMap, stacklevel: int) -> None:
    """Check a model of an architecture that the tests don't know, when it is wrapped, and warn of what doesn't hold.

    Where going on from blocks gives other logits, every pass of this model runs whole from here on.

    Args:
        sites: the model's names.
        stacklevel: the caller's, for the warning.
    """
    report = check(sites)
    wrong = [finding for finding in report.findings if not finding.fine]
    if not wrong:
        return
    said = "; ".join(f"{finding.what}: {finding.says}" for finding in wrong)
    if any(finding.what == "firings" for finding in wrong):
        sites.regular = False
    if any(finding.what == "shapes" for finding in wrong):
        sites.uneven = True
    if any(finding.what == "replay" for finding in wrong):
        sites.family = replace(sites.family, replay=False, head=False)
        said += ", so every pass runs whole"
    warnings.warn(
        f"{sites.model_type or type(sites.model).__name__} is no architecture that mlxsteer was tested on, and a check "
        f"found {said}. model.check() prints all that was looked at.",
        UncheckedModel,
        stacklevel=stacklevel + 1,
    )


class _Forwards:
    """Forwards over the same few tokens."""

    def __init__(self, sites: SiteMap) -> None:
        self.sites = sites
        self.blocks = [sites.resolve(f"layers.{i}") for i in range(len(sites.blocks))]
        self.ids = mx.arange(1, TOKENS + 1)[None]
        self.tokens = Tokens([0], [TOKENS], TOKENS, [Prompt(TOKENS, list(range(1, TOKENS + 1)), whole=True)])
        self._plain: Plan | None = None

    def run(self, plan: Plan) -> mx.array:
        with attached(plan):
            output = self.sites.model(self.ids)
        return activation(output, self.sites.resolve("logits"))

    @property
    def plain(self) -> Plan:
        """A forward that changes nothing and sees every module's first call."""
        if self._plain is None:
            first = [self.sites.resolve(f"{key}#0") for key in self.sites.modules]
            plan = Plan(self.sites, [*first, self.sites.resolve("logits")], tokens=self.tokens)
            self.logits = self.run(plan)
            mx.eval(self.logits)
            self._plain = plan
        return self._plain

    def whole(self, site: Site) -> object:
        """All that a block gave in the plain forward."""
        return self.plain.captured[self.sites.resolve(f"{site.key}#0")]


def _names(sites: SiteMap) -> Finding:
    count = len(sites.blocks)
    found = dict.fromkeys(("attn", "attn.heads", "mlp"), 0)
    bare = []
    for layer in range(count):
        roles = sites.roles(layer)
        for role in roles:
            found[role] += 1
        if not roles:
            bare.append(layer)
    fixed = [key for key in ("embed", "norm") if key in sites.modules]
    parts = ", ".join([*fixed, "logits", *(f"{role} in {n} of {count}" for role, n in found.items() if n)])
    missing = [key for key in ("embed", "norm") if key not in fixed]
    lack = "no module of its own" if sites.checked else "no module by a name that mlxsteer knows"
    none = f"; {' and '.join(missing)}: {lack}" if missing else ""
    if bare:
        inside = ", ".join(sorted({k.split(".")[2] for k in sites.modules if k.startswith(f"layers.{bare[0]}.")}))
        none += f"; no role name in layers.{bare[0]} ({inside or 'it has no parts'}): its parts go by their own names"
    if rivals := sites.rivals:
        those = " and ".join([sites.container, *rivals])
        said = f"{those} are lists of {len(sites.blocks)} modules each, and layers.0 is taken from {sites.container}"
        return Finding("names", False, f"{said}: a `layers` property of the model says which is meant")
    return Finding("names", True, parts + none)


def _firings(forwards: _Forwards) -> Finding:
    calls = forwards.plain.calls
    count = {site.key: calls.get(id(site.module), 0) for site in forwards.blocks}
    never = [key for key, times in count.items() if not times]
    often = [key for key, times in count.items() if times > 1]
    if never:
        return Finding("firings", False, f"{_some(never)} never run{'s' * (len(never) == 1)}: a change there is lost")
    if often:
        times = f"run{'s' * (len(often) == 1)} several times in a forward"
        return Finding("firings", False, f"{_some(often)} {times}: say which, {often[0]}#0 or {often[0]}#1")
    quiet = sum(not calls.get(id(module), 0) for module in forwards.sites.modules.values())
    beside = f"; {quiet} modules inside them never do, and a key of theirs is refused" if quiet else ""
    return Finding("firings", True, f"every block runs once in a forward{beside}")


def _shapes(forwards: _Forwards) -> Finding:
    found: dict[tuple[tuple[int, ...], mx.Dtype], list[str]] = {}
    for site in forwards.blocks:
        value = activation(forwards.whole(site), site)
        found.setdefault((value.shape, value.dtype), []).append(site.key)
    (shape, dtype), _ = max(found.items(), key=lambda item: len(item[1]))
    width = forwards.sites.width(forwards.blocks[0])
    if len(found) > 1:
        said = "; ".join(f"{shape} {_name(dtype)} at {_some(keys)}" for (shape, dtype), keys in found.items())
        return Finding("shapes", False, f"the blocks differ: {said}")
    if len(shape) != 3 or shape[:2] != (1, TOKENS) or width not in (None, shape[-1]):
        return Finding("shapes", False, f"a block gives {shape} for 1 row of {TOKENS} tokens: no residual stream")
    return Finding("shapes", True, f"every block gives (batch, tokens, {shape[-1]}) in {_name(dtype)}")


def _inputs(forwards: _Forwards) -> Finding:
    """What enters a block is held to be what it takes first; a block may take its positions or a mask there."""
    given = {site.key: activation(forwards.whole(site), site).shape for site in forwards.blocks}
    entering = [forwards.sites.resolve(f"{key}.input") for key in given]
    plan = Plan(forwards.sites, entering, tokens=forwards.tokens)
    try:
        mx.eval(forwards.run(plan))
    except TypeError as error:
        return Finding("inputs", False, f"{str(error).rstrip('.')}; steer at the outputs")
    if len(plan.captured) < len(entering):
        return Finding("inputs", False, "the blocks run in the first forward only: a function is compiled around them")
    other = [
        f"{site.key} is {plan.captured[site].shape}"
        for site in entering
        if plan.captured[site].shape[:2] != given[site.key.removesuffix(".input")][:2] or plan.captured[site].ndim != 3
    ]
    if other:
        return Finding("inputs", False, f"{_some(other)}, no residual stream: steer at the outputs")
    return Finding("inputs", True, "what a block takes first is (batch, tokens, features)")


def _cause(forwards: _Forwards) -> Finding:
    count = len(forwards.blocks)
    tried = sorted({0, count // 2, count - 1})
    lost = []
    for layer in tried:
        plan = Plan(forwards.sites, edits=[(forwards.blocks[layer], Function(_changed))], tokens=forwards.tokens)
        if mx.array_equal(forwards.run(plan), forwards.logits).item():
            lost.append(f"layers.{layer}")
    if lost:
        return Finding("cause", False, f"a change at {_some(lost)} doesn't reach the logits")
    return Finding("cause", True, f"a change at {_some([f'layers.{i}' for i in tried])} changes the logits")


def _changed(x: mx.array) -> mx.array:
    return 1.5 * x + 0.25


def _replay(forwards: _Forwards) -> Finding:
    sites = forwards.sites
    if not sites.family.replay:
        return Finding("replay", True, "blocks leave something behind for later ones: every pass runs whole")
    middle = len(forwards.blocks) // 2
    given = {block: forwards.whole(block) for block in forwards.blocks[:middle]}
    again = forwards.run(Plan(sites, replay=given, tokens=forwards.tokens))
    if mx.array_equal(again, forwards.logits).item():
        return Finding("replay", True, f"going on from the blocks before layers.{middle} gives the same logits")
    off = mx.abs(again - forwards.logits).max().item()
    return Finding("replay", False, f"going on from the blocks before layers.{middle}, the logits differ by {off:.1e}")


def _batch(sites: SiteMap) -> Finding:
    if lack := no_generator(sites.model):
        return Finding("batch", True, lack)
    cache = make_prompt_cache(sites.model)
    if not sites.family.batch:
        return Finding("batch", True, "rows of mlx-lm's batches differ from rows alone: they run one at a time")
    if not all(hasattr(entry, "merge") for entry in cache if entry is not None):
        return Finding("batch", True, f"a {type(cache[0]).__name__} has no batches: rows run one at a time")
    forks = "" if forkable(cache) else ", and nothing shares a cache"
    return Finding("batch", True, f"rows run together{forks}")


def no_generator(model: nn.Module) -> str:
    """Why mlx-lm's generators can't run a model, which need a cache and a call that takes it; empty where they can."""
    taken = inspect.signature(type(model).__call__).parameters.values()
    if not any(one.name == "cache" or one.kind is one.VAR_KEYWORD for one in taken):
        return "a call without cache=, which mlx-lm's generators need: trace, record and steer work"
    if not hasattr(model, "layers") and not hasattr(model, "make_cache"):
        return "no model.layers, which mlx-lm's generators need: trace, record and steer work"
    return ""


def _some(keys: list[str]) -> str:
    return ", ".join(keys) if len(keys) <= 4 else f"{', '.join(keys[:3])} and {len(keys) - 3} more"


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rsplit(".", 1)[-1]
