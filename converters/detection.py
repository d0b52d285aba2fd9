"""Detection: the first family and target whose plan closes.

Detection is planning. A family applies if its `detect` names are there; a target fits if its plan closes;
and a file that fits several functions is never settled by a guess.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from converters.changes import SIZES, Ways, change, own_sizes, remove_classifier, takes, trained_windows
from converters.diagnosis import diagnose
from converters.errors import NotExpressible, PlanError, TargetError, printable
from converters.mapping import Mapping as Family
from converters.mapping import find_mappings, load_mapping, mappings_folder
from converters.plan import Plan, make_plan, read_off, rendered, without_classifier
from converters.preprocessing import fold_normalization, read_preprocessing, take_bgr
from converters.readers import Checkpoint
from converters.routes import Problem, Route, route
from converters.schema import Evidence, ReferenceFile, Refusal
from converters.signature import Sign, read_signature
from converters.target import build_skeleton, is_known, traits_of
from converters.values import filled

__all__ = ["Nearest", "applying_families", "find_nearest", "find_plan", "name_digest", "reference_of"]

_ALIKE = 8  # families that are looked at for the nearest
_OPTIONAL = ("head", "fc.", "fc_norm.", "classifier", "last_linear", "norm.")


def find_plan(
    checkpoint: Checkpoint,
    *,
    family: str | None = None,
    target: str | None = None,
    args: Mapping[str, Any] | None = None,
    img_size: int | list[int] | None = None,
    ways: Ways | None = None,
) -> Plan:
    """A plan that closes; `args` beyond the source's own sizes are changes, made in these `ways`.

    `img_size` is for models that are built for one size; others take any.

    Raises PlanError with every problem of the nearest target, NotExpressible where a family refuses the
    file, TargetError where `target` or `args` are none of timm's.
    """
    families = [load_mapping(family)] if family else applying_families(checkpoint)
    asked = _Asked(dict(args or {}), img_size, ways or Ways())
    nearest: tuple[tuple[Problem, ...], Family, str] | None = None
    refused: TargetError | None = None
    inexpressible: NotExpressible | None = None
    for mapping in families:
        if inexpressible and mapping.any_target:
            raise inexpressible  # its names may well be those of a timm model
        try:
            caveats = _check_refusals(mapping, checkpoint, asked)
        except NotExpressible as error:
            inexpressible = inexpressible or error
            continue
        routes = route(mapping, checkpoint.specs)
        closed: list[Plan] = []
        candidates = list(_candidates(mapping, checkpoint, routes, target))
        others: list[str] = []  # that may close with other sizes than timm's own
        for exactly, architecture in chain(((True, one) for one in candidates), ((False, one) for one in others)):
            if closed and not exactly:
                break
            try:
                plan = _plan_for(mapping, checkpoint, routes, architecture, asked, exactly)
            except TargetError as error:
                if target or not mapping.any_target:
                    raise
                refused = error  # the family's arguments are not every model's
                continue
            if not isinstance(plan, Plan):
                if exactly and all(problem.kind == "shape" for problem in plan):
                    others.append(architecture)
                if nearest is None or len(plan) < len(nearest[0]):
                    nearest = plan, mapping, architecture
            elif mapping.any_target and target is None:
                closed.append(replace(plan, caveats=(*caveats, *plan.caveats)))
            else:
                return replace(plan, caveats=(*caveats, *plan.caveats))
        if closed:
            return _only(closed, checkpoint)
    if inexpressible:
        raise inexpressible
    if refused and asked != _Asked({}, None, Ways()):
        raise refused  # it is the user's wish that does not fit
    if nearest:
        raise PlanError(str(diagnose(nearest[1], nearest[2], nearest[0])), file=checkpoint.path)
    raise refused or PlanError(
        f"is of no family that is known here, and no timm model has its tensors ({_first_names(checkpoint)})",
        file=checkpoint.path,
        cure=f"name a timm model with --to, or a mapping file or a family with --family ({', '.join(find_mappings())})",
    )


@dataclass(frozen=True)
class Nearest:
    """The family and target that come nearest to a checkpoint that is of none."""

    family: str
    target: str
    problems: int  # that keep the plan from closing


def find_nearest(checkpoint: Checkpoint) -> Nearest | None:
    """The family and target whose plan has the fewest problems; None where no family knows half of the tensors."""
    found: list[Nearest] = []
    asked = _Asked({}, None, Ways())
    applying = [mapping for mapping in applying_families(checkpoint) if not mapping.any_target]
    for mapping in applying or _alike(checkpoint):
        routes = route(mapping, checkpoint.specs)
        for architecture in _candidates(mapping, checkpoint, routes, None):
            try:
                plan = _plan_for(mapping, checkpoint, routes, architecture, asked, True)
            except TargetError:
                continue
            if not isinstance(plan, Plan):
                found.append(Nearest(mapping.name, architecture, len(plan)))
    return min(found, key=lambda one: one.problems, default=None)


def _alike(checkpoint: Checkpoint) -> list[Family]:
    """Families with rows for the most tensors, half at least; of those of which a name is there, or else of all."""
    shares: list[tuple[float, str]] = []
    for name, path in find_mappings().items():
        signature = read_signature(path.read_text("utf-8")) or load_mapping(name)
        there = [signs for signs in signature.detect if not all(sign.absent for sign in signs)]
        parts = [replace(signature, detect=(signs,)) for signs in there]
        shares.append((sum(part.applies(checkpoint.specs) for part in parts) / max(len(parts), 1), name))
    ranked = (load_mapping(name) for share, name in sorted(shares, reverse=True) if share)
    families = list(islice((mapping for mapping in ranked if not mapping.any_target), _ALIKE))
    families = families or [mapping for mapping in map(load_mapping, find_mappings()) if not mapping.any_target]
    routes = [route(mapping, checkpoint.specs) for mapping in families]
    rows = [sum(bool(item.match and item.match.rank[1]) for item in items) for items in routes]  # some match anything
    best = max(rows, default=0)
    enough = best and 2 * best >= len(checkpoint.tensors)
    return [mapping for mapping, count in zip(families, rows, strict=True) if enough and count == best]


def applying_families(checkpoint: Checkpoint) -> list[Family]:
    """The families whose `detect` names the checkpoint has, those for a few targets before those for any."""
    found, specs = [], checkpoint.specs
    for name, path in find_mappings().items():
        signature = read_signature(path.read_text("utf-8")) or load_mapping(name)
        if signature.applies(specs):
            found.append(load_mapping(name))
    return sorted(found, key=lambda mapping: mapping.any_target)


def reference_of(mapping: Family, checkpoint: Checkpoint, routes: tuple[Route, ...]) -> ReferenceFile | None:
    """The source framework's model whose function this checkpoint's weights belong to."""
    for reference in mapping.references:
        if _holds(reference.when, checkpoint, routes):
            return reference
    return None


@dataclass(frozen=True)
class _Asked:
    """What the user asks of the target."""

    args: dict[str, Any]
    img_size: int | list[int] | None
    ways: Ways

    @property
    def headless(self) -> bool:
        """Whether the classifier is to be removed."""
        return self.args.get("num_classes") == 0 and not self.ways.classes


def _plan_for(
    mapping: Family,
    checkpoint: Checkpoint,
    routes: tuple[Route, ...],
    architecture: str,
    asked: _Asked,
    exactly: bool,
) -> Plan | tuple[Problem, ...]:
    """The plan, or what keeps it from closing; `exactly` with timm's own sizes, else with those of the source."""
    traits = traits_of(architecture)
    if asked.headless and (rest := without_classifier(mapping, routes, traits)) != routes:
        plan = _plan_for(mapping, checkpoint, rest, architecture, asked, exactly)
        return remove_classifier(plan, read_off(mapping, routes, traits)) if isinstance(plan, Plan) else plan
    reference = reference_of(mapping, checkpoint, routes)
    own = mapping.args_of(architecture, reference)
    read = read_off(mapping, routes, traits)
    if "in_chans" in read:  # a stem may fold pixels into channels before its first convolution
        specs = build_skeleton(architecture, own).specs
        stems = [specs[f"{name}.weight"].shape[1] for name in traits.first_convs if f"{name}.weight" in specs]
        read["in_chans"] = read["in_chans"] * traits.in_chans // (stems or [traits.in_chans])[0]
    sizes = {key: asked.args[key] for key in SIZES if key in asked.args}
    given = {**own, **read, **{key: value for key, value in asked.args.items() if key not in sizes}}
    if asked.img_size and takes(build_skeleton(architecture, given), "img_size"):
        sizes.setdefault("img_size", asked.img_size)
    if exactly and not asked.ways.classes and not trained_windows(build_skeleton(architecture, given), sizes):
        plan = make_plan(mapping, routes, build_skeleton(architecture, given | sizes))
        if isinstance(plan, Plan):
            return _with_preprocessing(plan, reference, checkpoint, asked)
        if not sizes:
            return plan
    for _ in range(3):  # with other patches the grid is another one, and it may have another size
        skeleton = build_skeleton(architecture, given)
        plan = make_plan(mapping, routes, skeleton)
        if isinstance(plan, Plan):
            plan = _with_preprocessing(plan, reference, checkpoint, asked)
            return change(plan, sizes, asked.ways) if sizes or asked.ways.classes else plan
        more = {} if exactly else own_sizes(skeleton, plan)
        if not more:
            break
        given |= more
    return plan


def _with_preprocessing(plan: Plan, reference: ReferenceFile | None, checkpoint: Checkpoint, asked: _Asked) -> Plan:
    """The plan with what the file says of its model's input, or the user."""
    found, row = read_preprocessing(checkpoint.metadata), plan.mapping.targets.get(plan.skeleton.architecture, {})
    published = {**plan.mapping.preprocess, **(reference.preprocess if reference else {})}
    values = {**filled(published, row), **found.values}
    own = bool(values.pop("bgr", False))
    bgr = asked.ways.bgr if asked.ways.bgr is not None else found.bgr if found.values else own
    plan = replace(plan, preprocess=values)
    plan = take_bgr(plan) if bgr else plan
    return fold_normalization(plan) if asked.ways.fold_normalization else plan


def _candidates(
    mapping: Family, checkpoint: Checkpoint, routes: tuple[Route, ...], target: str | None
) -> Iterator[str]:
    if target:
        traits_of(target)
        yield target
    elif mapping.any_target:
        yield from _by_names(mapping, checkpoint, routes)
    else:
        yield from (name for name in mapping.targets if is_known(name))  # an older timm lacks some


def _by_names(mapping: Family, checkpoint: Checkpoint, routes: tuple[Route, ...]) -> list[str]:
    """The timm models that a checkpoint may be: the one that it names, or those with the names that its rules give."""
    named = checkpoint.metadata.get("arch") or checkpoint.metadata.get("architecture")
    if isinstance(named, str):
        try:
            traits_of(named)
            return [named]
        except TargetError:
            pass
    index = json.loads((mappings_folder() / "timm" / "index.json").read_text("utf-8"))
    return index.get(name_digest(rendered(mapping, routes)), [])


def name_digest(names: Iterable[str]) -> str:
    """A short digest of tensor names, without those of heads and final norms, which a user may have taken off."""
    kept = sorted(name for name in names if not name.startswith(_OPTIONAL))
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:12]


def _only(closed: list[Plan], checkpoint: Checkpoint) -> Plan:
    """The one plan that closed; several are several functions, and only the user knows which."""
    if len(closed) == 1:
        return closed[0]
    names = ", ".join(plan.skeleton.architecture for plan in closed)
    raise PlanError(
        f"fits {len(closed)} timm models that compute different functions ({names})",
        file=checkpoint.path,
        cure="say which with --to MODEL",
    )


def _check_refusals(mapping: Family, checkpoint: Checkpoint, asked: _Asked) -> tuple[str, ...]:
    """What is to be told, and the reasons that the file can neither confirm nor rule out.

    Raises NotExpressible for one that it confirms.
    """
    routes = route(mapping, checkpoint.specs)
    unsure: list[Refusal] = []
    for refusal in mapping.refuse:
        if refusal.of == "logits" and asked.headless:
            continue
        if _holds(refusal.when, checkpoint, routes):
            problem = f"is of {mapping.name}, but timm cannot compute it: {refusal.reason}"
            cure = "pass --num-classes 0 to have it without its classifier" if refusal.of == "logits" else None
            raise NotExpressible(problem, file=checkpoint.path, cure=cure)
        if refusal.unless and not _holds(refusal.unless, checkpoint, routes):
            unsure.append(refusal)
    told = [mapping.caveat] if mapping.caveat else []
    return (*told, *(f"the file does not say whether {one.reason}; its tensors cannot tell" for one in unsure))


def _holds(when: Evidence, checkpoint: Checkpoint, routes: tuple[Route, ...]) -> bool:
    if when.metadata is not None:
        said = _squeezed(json.dumps(checkpoint.metadata, default=str))
        texts = [when.metadata] if isinstance(when.metadata, str) else when.metadata
        if not any(_squeezed(text) in said for text in texts) or (when.without and _squeezed(when.without) in said):
            return False
    sources = [when.source] if isinstance(when.source, str) else when.source
    return sources is None or any(_are_there([one] if isinstance(one, str) else one, routes) for one in sources)


def _are_there(sources: list[str], routes: tuple[Route, ...]) -> bool:
    names, shapes = [item.own for item in routes], [item.spec.shape for item in routes]
    return all(Sign.parse(source, {}).found(names, shapes) for source in sources)


def _squeezed(text: str) -> str:
    """Text without spaces, quotes, escapes and last commas: configurations are written in many styles.

    >>> _squeezed("dilations=(\\n    1,\\n    2,\\n)"), _squeezed("dilations=(1, 2)")
    ('dilations=(1,2)', 'dilations=(1,2)')
    """
    bare = "".join(c for c in text.replace("\\n", "") if c not in " \t\r\n'\"\\")
    return re.sub(r",(?=[)\]}])", "", bare)


def _first_names(checkpoint: Checkpoint) -> str:
    names = [printable(name, 60) for name in list(checkpoint.tensors)[:3]]
    return ", ".join(names) + (", ..." if len(checkpoint.tensors) > 3 else "") or "it has none"
