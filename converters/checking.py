"""The check of a mapping, without anybody's weights: lint, closing on every target, parity where it is cheapest.

Each reference is built for each target, and the checkpoint that it would write must be detected, lead to that
target, and close. For the smallest target of each reference the source framework's own saver then writes a
checkpoint of random weights, which is converted and verified, and so are mutants of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from converters.closing import Closing, Question, ask, build, close, place_of, unaided
from converters.conversion import convert
from converters.errors import ConverterError, MappingError
from converters.lint import Finding, lint_closings, lint_file
from converters.mapping import Mapping, load_mapping
from converters.plan import Route, route
from converters.verifier import Verdict, verify
from converters.verifier.references.__main__ import RUNNERS
from converters.verifier.worker import run_task

__all__ = ["Case", "Check", "check"]

BATCH = 4  # from which batch norms take their statistics
SUFFIXES = {"keras": ".weights.h5", "flax": ".npz", "tensorflow": ".ckpt"}


@dataclass(frozen=True)
class Case:
    """A target with one of the references, and what came of it.

    exact          the same function in float64, and every mutant is another one
    nearly         the same, in float32 or within the deviation that the mapping declares; so are no mutants
    unproven       the same function, but so are mutants
    failed         another function, or none
    closes         every tensor has its place; no function was compared
    open           no plan closes, or the checkpoint is taken for another
    refused        the mapping says that timm cannot compute it
    not built      the reference has no such model
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
        """3 where parity failed or is unproven, else 1 where the mapping is at fault, else 0."""
        outcomes = {case.outcome for case in self.cases}
        if outcomes & {"failed", "unproven"}:
            return 3
        return int(bool(outcomes & {"open", "not built"}) or any(one.severity == "error" for one in self.findings))


def check(
    family: str,
    *,
    targets: Sequence[str] = (),
    everything: bool = False,
    parity: bool = True,
    img_size: int | None = None,
    python: str | None = None,
    timeout: float = 900.0,
    progress: Callable[[str], None] | None = None,
) -> Check:
    """Check a family, or a mapping file by its path, on some of its `targets` or on all.

    `everything` has parity run on every target, `parity=False` on none; `img_size` in pixels is for models that
    take any size. `python` is the interpreter that has the source framework, `timeout` in seconds is for each of
    its runs. Raises ConverterError when the mapping cannot be read or the framework is not there.
    """
    tell = progress or (lambda step: None)
    mapping = load_mapping(family)
    if foreign := [target for target in targets if target not in mapping.targets]:
        raise MappingError(f"lists no target `{foreign[0]}`", file=mapping.path, cure="add it to `targets:`")
    findings = lint_file(mapping, RUNNERS)
    if not mapping.references:
        return Check(
            mapping,
            tuple(findings),
            tuple(Case(t, "no reference") for t in mapping.target_names),
        )
    ways: dict[str, Any] = {"python": python, "timeout": timeout}
    with TemporaryDirectory(prefix="timmport-") as folder:
        questions = list(ask(mapping, targets, img_size))
        tell(f"building {len(questions)} references")
        built = build(questions, Path(folder), **ways)
        tell("closing")
        closings = [
            one for q, specs in built.items() if not isinstance(specs, str) if (one := close(mapping, q, specs))
        ]
        cases = {one.question: _case(mapping, one.question, one.outcome, one.detail) for one in closings}
        cases |= dict(_not_built(mapping, built, {one.target for one in cases}))
        seen = [(one.routes, one.plan) for one in closings]
        for closing in _worth_proving(closings, everything) if parity else ():
            tell(f"proving {closing.question.target}")
            cases[closing.question], routes = _prove(mapping, closing, cases[closing.question], Path(folder), ways)
            seen.append((routes, None))
    if not targets:
        findings += [*lint_closings(mapping, seen), *_idle(mapping, built, closings)]
    return Check(mapping, tuple(findings), tuple(cases[q] for q in questions if q in cases))


def _case(mapping: Mapping, question: Question, outcome: str, detail: str) -> Case:
    line, block = mapping.lines.of(*place_of(mapping, question.number)), question.block
    return Case(question.target, outcome, block["runner"], line, tuple(block["outputs"]), detail, question.parameters)


def _not_built(mapping: Mapping, built: dict[Question, Any], answered: set[str]) -> Iterator[tuple[Question, Case]]:
    """The targets that no reference answers for, with why each could not be built."""
    for question, specs in built.items():
        if question.target not in answered:
            detail = specs if isinstance(specs, str) else "its checkpoint is not one that `when` speaks of"
            yield question, _case(mapping, question, "not built", detail)


def _worth_proving(closings: Sequence[Closing], everything: bool) -> list[Closing]:
    """Those that close: all, or of each reference the one with the fewest parameters."""
    closed = [one for one in closings if one.outcome == "closes"]
    smallest: dict[int, Closing] = {}
    for one in sorted(closed, key=lambda one: one.question.parameters):
        smallest.setdefault(one.question.number, one)
    return closed if everything else list(smallest.values())


def _prove(
    mapping: Mapping, closing: Closing, case: Case, folder: Path, ways: dict[str, Any]
) -> tuple[Case, tuple[Route, ...]]:
    """The case with its verdict, and the routes of the checkpoint that was written."""
    question, block, start = closing.question, closing.question.block, time.monotonic()
    source, out = folder / f"source{SUFFIXES.get(block['runner'], '.pth')}", folder / "converted"
    model = {key: block[key] for key in ("runner", "model")}
    job = {"task": "write_weights", **model, "out": str(source), "prefix": closing.prefix, "training": True}
    routes, verdict = closing.routes, None
    try:
        run_task({**job, "input": [BATCH, *question.size]}, **ways)
        family, size = unaided(mapping), question.img_size
        done = convert(source, out, family=family, img_size=size, overwrite=True, allow_deviation=True)
        routes = route(mapping, done.checkpoint.specs)
        verdict = verify(out, source, mutants=True, **ways)
        exact = verdict.precision == "float64" and not verdict.deviation
        outcome = {"passed": "exact" if exact else "nearly"}.get(verdict.outcome, verdict.outcome)
        detail = str(verdict.mutants if outcome == "unproven" else verdict)
    except ConverterError as error:
        outcome, detail = "failed", str(error)
    finally:
        source.unlink(missing_ok=True)
    seconds = time.monotonic() - start
    return replace(case, outcome=outcome, detail=detail, seconds=seconds, verdict=verdict), routes


def _idle(mapping: Mapping, built: dict[Question, Any], closings: Sequence[Closing]) -> Iterator[Finding]:
    """References that answer for no target."""
    answering = {closing.question.number for closing in closings}
    for number, reference in enumerate(mapping.references):
        if number not in answering and reference.runner in RUNNERS:
            errors = [specs for q, specs in built.items() if q.number == number and isinstance(specs, str)]
            reason = f": {errors[0]}" if errors else ", or another one does before it"
            line = mapping.lines.of(*place_of(mapping, number))
            yield Finding(line, "error", f"the reference `{reference.runner}` answers for no target{reason}")
