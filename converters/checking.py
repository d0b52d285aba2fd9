"""The check of a mapping, without anybody's weights: lint, closing on every target, parity where it is cheapest.

Each reference is built for each target, and the checkpoint that it would write must be detected, lead to that
target, and close. For the smallest target of each reference the source framework's own saver then writes a
checkpoint of random weights, which is converted and verified, and so are mutants of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy

from converters.closing import Closing, Question, Unbuilt, ask, build, close, place_of, pose, unaided
from converters.conversion import convert
from converters.dropped import known_values
from converters.errors import ConverterError, MappingError
from converters.lint import Finding, lint_closings, lint_file
from converters.mapping import Mapping, load_mapping
from converters.routes import Route, route
from converters.rows import Drop
from converters.verifier import Verdict, verify
from converters.verifier.references.__main__ import RUNNERS
from converters.verifier.worker import Workers, run_task

__all__ = ["Case", "Check", "check"]

BATCH = 4  # from which batch norms take their statistics
SIZE = 96  # pixels, for models that take any size: a feature map of stride 32 still has a middle
MOST = 256  # for models that are built for one size, and can be for a half or a quarter of it
SUFFIXES = {"keras": ".weights.h5", "flax": ".npz", "tensorflow": ".ckpt"}

Place = tuple[str, int]  # a target, and the number of a reference
Answer = Closing | Unbuilt | None  # None: another reference answers for that checkpoint


@dataclass(frozen=True)
class Case:
    """A target with one of the references, and what came of it.

    exact          the same function in float64; mutants, where some were tried, are all other ones
    nearly         the same, in float32 or within the deviation that the mapping declares; so are no mutants
    unproven       the same function, but so are mutants
    failed         another function, or none
    closes         every tensor has its place; no function was compared
    open           no plan closes, or the checkpoint is taken for another
    refused        the mapping says that timm cannot compute it
    not built      the reference has no such model
    not installed  the interpreter lacks the framework
    no reference   the mapping names none
    """

    target: str
    outcome: str
    runner: str = ""
    line: int = 0  # of the reference
    outputs: tuple[str, ...] = ()  # that it gives
    detail: str = ""
    parameters: int = 0
    seconds: float = 0.0  # that parity took
    verdict: Verdict | None = None

    @property
    def worst_error(self) -> float | None:
        """Of all outputs."""
        comparisons = self.verdict.comparisons if self.verdict else ()
        return max((error for one in comparisons for error in one.sample_errors), default=None)

    @property
    def smallest_margin(self) -> float | None:
        """How far the mutant that is hardest to detect is beyond what is allowed."""
        return self.verdict.mutants.smallest_margin if self.verdict and self.verdict.mutants else None


@dataclass(frozen=True)
class Check:
    """What was found out about a mapping."""

    mapping: Mapping
    findings: tuple[Finding, ...]
    cases: tuple[Case, ...]

    @property
    def exit_code(self) -> int:
        """3 where parity failed or is unproven, else 1 where the mapping is at fault or could not be asked, else 0."""
        outcomes = {case.outcome for case in self.cases}
        if outcomes & {"failed", "unproven"}:
            return 3
        at_fault = bool(outcomes & {"open", "not built", "not installed"})
        return int(at_fault or any(one.severity == "error" for one in self.findings))


def check(
    family: str,
    *,
    targets: Sequence[str] = (),
    everything: bool = False,
    parity: bool | Callable[[Case, bool], bool] = True,
    img_size: int | None = None,
    python: str | None = None,
    timeout: float = 900.0,
    workers: Workers | None = None,
    progress: Callable[[str], None] | None = None,
    proved: Callable[[Case], None] | None = None,
) -> Check:
    """Check a family, or a mapping file by its path, on some of its `targets` or on all.

    `everything` has parity run on every target, without mutants where a smaller target has them; `parity=False` on
    none, or on those only of which it says so, told what closes and whether there would be mutants. Each is told to
    `proved` as soon as it is done. `img_size` in pixels is for models that take any size. `python` is the
    interpreter that has the source framework, `timeout` in seconds is for each of its runs, which `workers` do, if
    they are to live on. Raises ConverterError when the mapping cannot be read or the framework is not there.
    """
    tell = progress or (lambda step: None)
    mapping = load_mapping(family)
    if foreign := [target for target in targets if target not in mapping.targets]:
        raise MappingError(f"lists no target `{foreign[0]}`", file=mapping.path, cure="add it to `targets:`")
    findings = lint_file(mapping, RUNNERS)
    if not mapping.references:
        return Check(mapping, tuple(findings), tuple(Case(t, "no reference") for t in mapping.target_names))
    with nullcontext(workers) if workers else Workers() as workers, TemporaryDirectory(prefix="timmport-") as name:
        ways: dict[str, Any] = {"python": python, "timeout": timeout, "workers": workers}
        folder = Path(name)
        questions = list(ask(mapping, targets, img_size or SIZE))
        tell(f"building {len(questions)} references")
        answers = _answer(mapping, questions, folder, ways)
        if img_size is None:  # some want more than so small an image
            again = [pose(mapping, *at, None) for at, answer in answers.items() if _unsettled(answer)]
            answers |= _answer(mapping, list(filter(None, again)), folder, ways)
        cases = dict(_cases(mapping, answers))
        answered = [one for one in answers.values() if isinstance(one, Closing)]
        seen = [(one.routes, one.plan) for one in answered]
        closings = [one for one in answered if one.outcome == "closes"]
        wanted = parity if callable(parity) else lambda case, mutants: parity
        smallest = _smallest(closings)
        more = [one for one in closings if one not in smallest] if everything else []
        for closing in smallest + more:
            at, mutants = (closing.question.target, closing.question.number), closing in smallest
            if wanted(cases[at], mutants):
                tell(f"proving {at[0]}")
                cases[at], routes = _prove(mapping, closing, img_size, folder, ways, mutants)
                seen.append((routes, None))
                if proved:
                    proved(cases[at])
    if not targets:
        findings += [*lint_closings(mapping, seen), *_idle(mapping, answers)]
    return Check(mapping, tuple(findings), tuple(cases[at] for at in answers if at in cases))


def _answer(mapping: Mapping, questions: Sequence[Question], folder: Path, ways: dict[str, Any]) -> dict[Place, Answer]:
    """What becomes of each reference for each target."""
    return {
        (question.target, question.number): specs if isinstance(specs, Unbuilt) else close(mapping, question, specs)
        for question, specs in build(questions, folder, **ways).items()
    }


def _unsettled(answer: Answer) -> bool:
    return answer.installed if isinstance(answer, Unbuilt) else answer is not None and answer.outcome == "open"


def _cases(mapping: Mapping, answers: dict[Place, Answer]) -> Iterator[tuple[Place, Case]]:
    """What closes or does not, and the targets that no reference answers for."""
    answered = {target for (target, _), one in answers.items() if isinstance(one, Closing)}
    unbuilt = {target for (target, _), one in answers.items() if isinstance(one, Unbuilt)}
    for (target, number), one in answers.items():
        if isinstance(one, Closing):
            yield (target, number), _case(mapping, one)
        elif target not in answered and (one or target not in unbuilt):
            reference = mapping.references[number]
            outcome = "not built" if one is None or one.installed else "not installed"
            detail = one.reason if one else "its checkpoint is not one that `when` speaks of"
            where = reference.runner, mapping.lines.of(*place_of(mapping, number)), tuple(reference.outputs)
            yield (target, number), Case(target, outcome, *where, detail)


def _case(mapping: Mapping, closing: Closing) -> Case:
    question = closing.question
    line, block = mapping.lines.of(*place_of(mapping, question.number)), question.block
    where = block["runner"], line, tuple(block["outputs"])
    return Case(question.target, closing.outcome, *where, closing.detail, question.parameters)


def _smallest(closings: Iterable[Closing]) -> list[Closing]:
    """Of each reference the one with the fewest parameters."""
    smallest: dict[int, Closing] = {}
    for one in sorted(closings, key=lambda one: one.question.parameters):
        smallest.setdefault(one.question.number, one)
    return list(smallest.values())


def _prove(
    mapping: Mapping, closing: Closing, img_size: int | None, folder: Path, ways: dict[str, Any], mutants: bool
) -> tuple[Case, tuple[Route, ...]]:
    """The case with its verdict, and the routes of the checkpoint that was written; small images are tried first."""
    question, start = closing.question, time.monotonic()
    at = mapping, question.target, question.number
    routes, outcome, verdict, detail = closing.routes, "failed", None, ""
    side = question.size[-1] // 2
    while side > MOST:
        side //= 2
    smaller = None if question.img_size or img_size else pose(*at, side, rebuilt=True)
    whole = question if img_size or not question.img_size else pose(*at, None)
    for one in dict.fromkeys(filter(None, (smaller, question, whole))):
        try:
            routes, verdict = _compare(mapping, replace(closing, question=one), folder, ways, mutants)
        except ConverterError as error:
            outcome, verdict, detail = "failed", None, str(error)
            continue
        exact = verdict.precision == "float64" and not verdict.deviation
        outcome = {"passed": "exact" if exact else "nearly"}.get(verdict.outcome, verdict.outcome)
        detail = str(verdict.mutants if outcome == "unproven" else verdict)
        if not one.rebuilt or outcome in ("exact", "nearly"):
            break
    seconds = time.monotonic() - start
    return replace(_case(mapping, closing), outcome=outcome, detail=detail, seconds=seconds, verdict=verdict), routes


def _compare(
    mapping: Mapping, closing: Closing, folder: Path, ways: dict[str, Any], mutants: bool
) -> tuple[tuple[Route, ...], Verdict]:
    """A checkpoint of random weights, written, converted and verified. Raises ConverterError."""
    question, block = closing.question, closing.question.block
    source, out = folder / f"source{SUFFIXES.get(block['runner'], '.pth')}", folder / "converted"
    model = {key: block[key] for key in ("runner", "model")}
    job = {"task": "write_weights", **model, "out": str(source), "prefix": closing.prefix, "training": True}
    job["input"] = [BATCH, *question.size]
    try:
        run_task(job, **ways)
        how: dict[str, Any] = {"family": unaided(mapping)}
        if question.rebuilt:  # such shapes may be another target's
            how = {"family": mapping.name, "target": question.target}
        how["img_size"] = question.img_size
        if any(isinstance(row, Drop) and (row.zeros or row.buffer) for row in mapping.rows):
            planned = convert(source, out, **how, dry_run=True)
            known = {name: value.numpy() for name, value in known_values(planned.plan, planned.checkpoint)}
            if known:
                numpy.savez(folder / "known.npz", allow_pickle=False, **known)
                run_task({**job, "known": str(folder / "known.npz")}, **ways)
        done = convert(source, out, **how, overwrite=True, allow_deviation=True)
        return route(mapping, done.checkpoint.specs), verify(out, source, mutants=mutants, quick=True, **ways)
    finally:
        source.unlink(missing_ok=True)


def _idle(mapping: Mapping, answers: dict[Place, Answer]) -> Iterator[Finding]:
    """References that answer for no target."""
    answering = {number for (_, number), one in answers.items() if isinstance(one, Closing)}
    for number, reference in enumerate(mapping.references):
        if number in answering or reference.runner not in RUNNERS:
            continue
        unbuilt = [one for (_, own), one in answers.items() if own == number and isinstance(one, Unbuilt)]
        reason = f": {unbuilt[0].reason}" if unbuilt else ", or another one does before it"
        severity = "error" if all(one.installed for one in unbuilt) else "warning"
        line = mapping.lines.of(*place_of(mapping, number))
        yield Finding(line, severity, f"the reference `{reference.runner}` answers for no target{reason}")
