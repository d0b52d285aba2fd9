"""Reports for a terminal: the verdict first, indices folded, names from files escaped."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from converters.conversion import Conversion, Inspection
from converters.errors import printable
from converters.folding import fold
from converters.mapping import Mapping, find_mappings
from converters.plan import Plan
from converters.readers import Checkpoint
from converters.reports.divergence import divergence_lines, summary_lines
from converters.reports.plans import fold_plan
from converters.tensors import size_of

if TYPE_CHECKING:
    from converters.checking import Check
    from converters.demo import Demo
    from converters.verifier import Verdict
    from converters.verifier.mutants import Mutants
    from converters.verifier.recording import Recording

__all__ = [
    "console",
    "progress_bar",
    "show_check",
    "show_conversion",
    "show_demo",
    "show_families",
    "show_family",
    "show_inspection",
    "show_recording",
    "show_verdict",
    "show_worker",
    "status",
]

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
_MOST_ROWS = 60
_COLOURS = {  # of what came of a target; the others are red
    **dict.fromkeys(("exact", "closes"), "green"),
    **dict.fromkeys(("nearly", "refused", "not installed"), "yellow"),
    "no reference": "dim",
}


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar over bytes on standard error, on a terminal only; elsewhere None."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def status() -> Iterator[Callable[[str], None] | None]:
    """A line on standard error that says what is going on, on a terminal only; elsewhere None."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield None
        return
    with errors.status("starting") as shown:
        yield shown.update


def show_inspection(inspection: Inspection) -> None:
    """What the file is, what it would become, and its tensors, folded."""
    checkpoint, plan = inspection.checkpoint, inspection.plan
    specs = checkpoint.specs
    dtypes = Counter(spec.dtype for spec in specs.values())
    _say("file", checkpoint.path)
    _say("format", checkpoint.format + (f", written by {checkpoint.writer}" if checkpoint.writer else ""))
    _say("integrity", checkpoint.integrity)
    _say("wrappers", " > ".join(checkpoint.wrappers))
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    _say("tensors", f"{len(specs)} ({kinds}), {_bytes(sum(spec.nbytes for spec in specs.values()))}")
    if plan:
        _say("family", plan.mapping.name)
        _say("target", _target(plan))
        _say("dropped", _reasons({name: drop.reason for name, drop in plan.drops.items()}))
    if near := inspection.nearest:
        _say("nearest", f"{near.family}, to {near.target}: {near.problems} problem{'s' * (near.problems != 1)}")
    _caveats(checkpoint, plan)
    _say("set aside", "; ".join(f"{name} ({reason})" for name, reason in checkpoint.set_aside.items()))
    _say("metadata", ", ".join(_brief(key, value) for key, value in checkpoint.metadata.items()))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("tensor", "count", "shape", "dtype"):
        table.add_column(column, overflow="fold")
    alike: dict[tuple[Any, ...], list[str]] = {}
    for spec in specs.values():
        alike.setdefault((spec.shape, spec.dtype), []).append(spec.name)
    rows = [(text, count, *key) for key, names in alike.items() for text, count in fold(names)]
    for text, count, shape, dtype in rows[:_MOST_ROWS]:
        table.add_row(escape(printable(text)), str(count), size_of(shape), dtype)
    console.print(table)
    if len(rows) > _MOST_ROWS:
        console.print(f"... and {len(rows) - _MOST_ROWS} rows more; --json lists every tensor")
    if not plan:
        console.print(f"\n[yellow]no plan closes:[/] {escape(inspection.reason)}")


def show_conversion(conversion: Conversion) -> None:
    """Where the weights went, or with a dry run the plan."""
    checkpoint, plan = conversion.checkpoint, conversion.plan
    tensors = [step for step in plan.steps if step.origin.fill is None]
    if conversion.directory:
        console.print(
            f"[green]converted[/] {escape(printable(str(checkpoint.path)))} to {escape(str(conversion.directory))}"
        )
    _say("format", " > ".join((checkpoint.format, *checkpoint.wrappers)))
    _say("family", plan.mapping.name)
    _say("target", _target(plan))
    used = sum(len(steps[0].origin.sources) for steps in plan.origins.values())
    _say("tensors", f"{len(plan.steps)} closed: {used} sources used, {len(plan.drops)} dropped")
    moved = Counter(step.origin.ops.text for step in tensors if step.origin.ops.ops)
    _say("ops", "; ".join(f"{text} ({count}x)" for text, count in moved.most_common()))
    _say("filled", ", ".join(f"{text} = {value}" for text, value in _fills(plan)))
    _say("dropped", _reasons({name: drop.reason for name, drop in plan.drops.items()}))
    for change in plan.changes:
        _say("changed", f"{change.text}, on request")
    _say("set aside", "; ".join(f"{name} ({reason})" for name, reason in checkpoint.set_aside.items()))
    _caveats(checkpoint, plan)
    if conversion.directory:
        _say("load with", f"timm.create_model('local-dir:{conversion.directory}', pretrained=True)")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("line", "from", "ops", "to", "count"):
        table.add_column(column, overflow="fold")
    for one in sorted(fold_plan(plan), key=lambda one: one.lines):
        if one.lines:
            lines = ", ".join(map(str, one.lines))
            table.add_row(lines, *map(escape, (printable(one.sources), one.ops, one.target)), str(one.count))
    console.print(table)


def show_verdict(verdict: Verdict) -> None:
    """The verdict first, then the way to the fault, if there is one, and every output that was compared."""
    mark = {"passed": "[green]passed[/]", "unproven": "[yellow]UNPROVEN[/]"}.get(verdict.outcome, "[red]FAILED[/]")
    console.print(f"{mark} {escape(str(verdict))}")
    for line in divergence_lines(verdict):
        console.print(f"  {escape(printable(line, 400))}")
    for label, text in summary_lines(verdict):
        _say(label, text)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("output", "probe", "gate", "error", "allowed", ""):
        table.add_column(column, overflow="fold")
    for one in verdict.comparisons:
        error = f"{max(one.sample_errors):.1e}" if one.sample_errors else "-"
        bound = f"{min(one.bounds):.1e}" if one.bounds else "-"
        mark = "[green]passed[/]" if one.passed else f"[red]{escape(str(one.reason))}[/]"
        table.add_row(escape(printable(one.output)), escape(printable(one.probe)), one.precision, error, bound, mark)
    console.print(table)
    if verdict.mutants:
        _mutants(verdict.mutants)
    for warning in verdict.warnings:
        console.print(f"[yellow]warning[/]    {escape(printable(warning, 1000))}")


def show_check(check: Check) -> None:
    """A mapping's findings, and what came of every target."""
    shipped = check.mapping.name in find_mappings()
    file = f"mappings/{check.mapping.name}.yaml" if shipped else check.mapping.name
    for finding in check.findings:
        colour = "red" if finding.severity == "error" else "yellow"
        place = escape(printable(f"{file}:{finding.line}"))
        console.print(f"{place}: [{colour}]{finding.severity}[/] {escape(printable(finding.problem, 1000))}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("target", "reference", "line", "outcome", "error", "margin", "seconds"):
        table.add_column(column, overflow="fold")
    for case in check.cases:
        colour = _COLOURS.get(case.outcome, "red")
        error = "" if case.worst_error is None else f"{case.worst_error:.1e}"
        margin = "" if case.smallest_margin is None else f"{case.smallest_margin:.0e}"
        line, seconds = (f"{number:.0f}" if number else "" for number in (case.line, case.seconds))
        table.add_row(case.target, case.runner, line, f"[{colour}]{case.outcome}[/]", error, margin, seconds)
    console.print(table)
    for case in check.cases:
        if case.outcome not in ("exact", "closes", "no reference"):
            text = "\n".join(escape(printable(line, 1000)) for line in case.detail.splitlines())
            console.print(f"\n[{_COLOURS.get(case.outcome, 'red')}]{case.target}[/] {case.runner}: {text}")


def show_recording(recording: Recording, path: Path) -> None:
    """What was recorded, and with what."""
    about = recording.about
    _say("recorded", path)
    _say("reference", f"{about['runner']} on {about['source']['file']}")
    _say("framework", ", ".join(f"{name} {version}" for name, version in about.get("framework", {}).items()))
    _say("outputs", ", ".join(recording.output_names) + f" in {' and '.join(recording.outputs)}")
    for note in about.get("notes", []):
        console.print(f"[yellow]warning[/]    {escape(printable(str(note), 1000))}")


def show_worker(folder: Path, checkpoint: Path) -> None:
    """How to run a worker's folder elsewhere."""
    _say("wrote", folder)
    _say("copy it", f"with {checkpoint.name} to a machine whose Python has the framework and numpy, and there:")
    _say("", f"python {folder.name}/references.pyz {folder.name} {checkpoint.name}")
    _say("take back", f"{folder.name}/recording.npz, for `timmport verify --reference`")


def show_demo(demo: Demo) -> None:
    """The whole way: what the file is, what became of it, parity, and the same accuracy on both sides."""
    console.rule("timmport inspect", align="left")
    show_inspection(demo.inspection)
    console.rule("timmport convert", align="left")
    show_conversion(demo.conversion)
    console.rule("timmport verify", align="left")
    show_verdict(demo.verdict)
    _say("accuracy", f"{demo.accuracy_before:.2%} in Keras, {demo.accuracy_after:.2%} in timm, on held-out digits")


def show_families(mappings: Iterable[Mapping]) -> None:
    """Every family in a line."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("family", "targets", "reference", "what it is"):
        table.add_column(column, overflow="fold")
    for mapping in mappings:
        references = ", ".join(dict.fromkeys(reference.runner for reference in mapping.references)) or "-"
        table.add_row(
            mapping.name,
            "any" if mapping.any_target else str(len(mapping.targets) or "refused"),
            references,
            escape(mapping.title),
        )
    console.print(table)


def show_family(mapping: Mapping) -> None:
    """One family: targets, references, refusals."""
    console.print(escape(mapping.title))
    _say("file", mapping.path)
    _say("targets", ", ".join(mapping.targets) or ("any timm model" if mapping.any_target else "none"))
    _say("references", ", ".join(reference.runner for reference in mapping.references))
    for refusal in mapping.refuse:
        _say("refuses", refusal.reason)


def _mutants(mutants: Mutants) -> None:
    """Every mutant, and what the weights do not let anybody detect."""
    _say("mutants", str(mutants))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("mutant", "tensor", "", "error", "times allowed", ""):
        table.add_column(column, overflow="fold")
    for one in mutants.mutants:
        mark = "[green]fails[/]" if one.detected else "[red]PASSES[/]"
        table.add_row(one.kind, escape(one.tensor), escape(one.detail), f"{one.error:.1e}", f"{one.margin:.0e}", mark)
    console.print(table)
    for none in mutants.undetectable:
        where = f"{none.kind} in {none.tensor} ({none.detail})"
        console.print(f"[dim]undetectable with these weights:[/] {escape(where)}: {escape(none.reason)}")


def _say(label: str, text: Any) -> None:
    if str(text):
        console.print(f"[dim]{label:<10}[/] {escape(printable(str(text), 1000))}")


def _target(plan: Plan) -> str:
    args = ", ".join(f"{key}={value}" for key, value in plan.skeleton.args.items())
    return plan.skeleton.architecture + (f" ({args})" if args else "")


def _caveats(checkpoint: Checkpoint, plan: Plan | None) -> None:
    for caveat in (*(plan.caveats if plan else ()), *checkpoint.notes):
        console.print(f"[yellow]caveat[/]     {escape(printable(caveat, 1000))}")


def _fills(plan: Plan) -> list[tuple[str, Any]]:
    by_value: dict[Any, list[str]] = {}
    for step in plan.steps:
        if step.origin.fill is not None:
            by_value.setdefault(step.origin.fill, []).append("**." + step.target.name.rpartition(".")[2])
    return [(name, value) for value, names in by_value.items() for name in dict.fromkeys(names)]


def _reasons(by_name: dict[str, str]) -> str:
    counts = Counter(by_name.values())
    return "; ".join(f"{count} ({reason})" for reason, count in counts.most_common())


def _brief(key: str, value: Any) -> str:
    text = f"{{{len(value)}}}" if isinstance(value, dict) else repr(value)
    return f"{key}: {printable(text, 60)}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.{0 if unit == 'B' else 1}f} {unit}"
        count /= 1000
    return ""
