"""Write COVERAGE.md: what has been shown of every target of every family, and when.

    python tools/coverage.py [FAMILY...] [--all | --up-to MILLIONS]

checks the families (see converters/checking.py): every target is closed, and the smallest of each reference is run
against the source framework, with mutants; with --all each is run, or each of up to so many million parameters, but
for those of which parity is known already. Results are kept in tools/coverage/, a file for each family, from which
the table is rendered: parity is written as soon as it was shown, and stays until the mapping changes, so that a run
that was stopped goes on where it was. `--render` runs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator
from collections.abc import Mapping as Dict
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converters.checking import Case, Check, check
from converters.mapping import Mapping, find_mappings, load_mapping
from converters.verifier.worker import Workers

ROOT = Path(__file__).parents[1]
RESULTS, TABLE = ROOT / "tools" / "coverage", ROOT / "COVERAGE.md"
COLUMNS = ("family", "line", "reference", "target", "outcome", "worst error", "smallest margin", "versions", "date")
HEAD = """# Coverage

What `timmport check` has shown, without anybody's weights. tools/coverage.py writes this file. The line is where the
reference stands in its mapping file; behind its runner are the first and the last of the outputs that were compared.

- **exact**: random weights, written by the source framework's own saver, gave the same outputs and activations on
  both sides. The worst error is relative to the largest value of a sample; 1e-10 passes. For the smallest target of
  each reference, mutants of the conversion all failed, the one that is hardest to detect by the smallest margin, in
  multiples of what passes.
- **nearly**: the same with a weaker gate: the framework computes in float32 only, or the mapping declares a deviation.
- **closes**: every tensor that the source framework's model has is used or dropped for a written reason, and every
  tensor of timm's has one origin; the functions were not compared.
- **no reference**: the family names no model of the source framework that could be run.

"""
Row = dict[str, Any]


def row_of(mapping: Mapping, case: Case) -> Row:
    return {
        "family": mapping.name,
        "line": case.line,
        "reference": reference_of(case),
        "target": case.target,
        "outcome": case.outcome,
        "worst_error": case.worst_error,
        "smallest_margin": case.smallest_margin,
        "versions": versions_of(case),
        "date": date.today().isoformat(),
        "family_sha256": digest_of(mapping.path),
    }


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reference_of(case: Case) -> str:
    """The runner and what is compared, for the table."""
    return ", ".join(dict.fromkeys([case.runner, *case.outputs[:1], *case.outputs[-1:]]))


def versions_of(case: Case) -> dict[str, str]:
    framework = case.verdict.reference.get("framework", {}) if case.verdict else {}
    kept = {name: framework[name] for name in (case.runner, "tensorflow") if name in framework}
    return {**kept, "timm": version("timm"), "torch": version("torch").partition("+")[0]}


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """The new rows of a family; what was shown for the same mapping is not forgotten where less was asked now."""
    shown = {identity(row): row for row in old}
    return [_better(shown.get(identity(row)), row) for row in new]


def identity(row: Row) -> tuple[str, ...]:
    return tuple(row[key] for key in ("family", "line", "target", "family_sha256"))


def _better(shown: Row | None, row: Row) -> Row:
    kept = row["outcome"] == "not installed" or (row["outcome"] == "closes" and proved(shown))
    return shown if shown and kept else row


def read_results() -> dict[str, list[Row]]:
    """The rows of every family that there is, by its name."""
    found = {name: RESULTS / f"{name}.json" for name in find_mappings()}
    return {name: json.loads(path.read_text("utf-8")) for name, path in found.items() if path.is_file()}


def write_results(family: str, rows: list[Row]) -> None:
    """A row a line."""
    path = RESULTS / f"{family}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", "utf-8")


def render(results: Dict[str, Iterable[Row]]) -> str:
    """COVERAGE.md."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in (row for rows in results.values() for row in rows):
        versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
        figures = figure(row["worst_error"], ".1e"), figure(row["smallest_margin"], ".0e")
        where = row["family"], str(row["line"] or ""), row["reference"]
        cells = (*where, row["target"], row["outcome"], *figures, versions, row["date"])
        lines.append(f"| {' | '.join(cells)} |".replace("  ", " "))
    lines += ["", "## Refused", ""]
    lines += [f"- {family}: {one.reason}" for family in find_mappings() for one in load_mapping(family).refuse]
    return HEAD + "\n".join(lines) + "\n"


def figure(value: float | None, form: str) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:{form}}"


def run(families: Iterable[str], largest: float) -> Iterator[Check]:
    """The checks, on workers that they share; what they show is written."""
    with Workers() as workers:
        for family in families:
            tell = partial(print, f"{family}:", flush=True)
            if largest and all(map(proved, rows_that_hold(family).values() or [None])):
                tell("all of it is known")
            else:
                yield run_one(family, largest, workers=workers, progress=tell)


def run_one(family: str, largest: float, **how: Any) -> Check:
    """The check of a family, with parity up to so many parameters where results lack it; with 0 as by default."""
    mapping, known = load_mapping(family), rows_that_hold(family)

    def wanted(case: Case, mutants: bool) -> bool:
        if not largest:
            return True
        shown = known.get(identity(row_of(mapping, case)))
        fits = mutants or case.parameters <= largest
        return fits and not (proved(shown) and (shown["smallest_margin"] is not None or not mutants))

    def keep(case: Case) -> None:
        row = row_of(mapping, case)
        shown = {identity(one): one for one in read_results().get(family, [])}
        write_results(family, list({**shown, identity(row): row}.values()))

    found = check(family, everything=largest > 0, parity=wanted, proved=keep, **how)
    write_results(family, merge(read_results().get(family, []), [row_of(mapping, case) for case in found.cases]))
    return found


def rows_that_hold(family: str) -> dict[tuple[str, ...], Row]:
    """The rows of a family's mapping as it stands."""
    sha256 = digest_of(load_mapping(family).path)
    return {identity(row): row for row in read_results().get(family, []) if row["family_sha256"] == sha256}


def proved(row: Row | None) -> bool:
    return row is not None and row["outcome"] in ("exact", "nearly")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=list(find_mappings()), metavar="FAMILY")
    parser.add_argument("--all", action="store_const", dest="up_to", const=math.inf, default=0)
    parser.add_argument("--up-to", type=float, metavar="MILLIONS")
    parser.add_argument("--render", action="store_true")
    given = parser.parse_args(arguments)
    worst = 0
    for found in run(given.families, given.up_to * 1e6) if not given.render else ():
        family = found.mapping.name
        for finding in found.findings:
            print(f"{family}:{finding.line}: {finding.severity} {finding.problem}")
        for case in found.cases:
            if case.outcome not in ("exact", "nearly", "closes", "refused", "no reference"):
                print(f"{family}: {case.target} {case.runner}: {case.outcome}: {case.detail}")
        worst = max(worst, found.exit_code)
    results = read_results()
    TABLE.write_text(render(results), "utf-8")
    print(f"{TABLE.name}: {sum(map(len, results.values()))} rows")
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
