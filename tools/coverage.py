"""Write COVERAGE.md: what has been shown of every target of every family, and when.

    python tools/coverage.py [FAMILY...] [--all | --up-to MILLIONS]

checks the families (see converters/checking.py): every target is closed, and the smallest of each reference is run
against the source framework, with mutants; with --all each is run, or each of up to so many million parameters,
except for families of which all that is known already. Results are kept in tools/coverage/, a file for
each family, from which the table is rendered; one of parity stays until its mapping changes. `--render` runs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converters.checking import Case, Check, check
from converters.mapping import find_mappings, load_mapping
from converters.verifier.worker import Workers

ROOT = Path(__file__).parents[1]
RESULTS, TABLE = ROOT / "tools" / "coverage", ROOT / "COVERAGE.md"
COLUMNS = ("family", "reference", "target", "outcome", "worst error", "smallest margin", "versions", "date")
HEAD = """# Coverage

What `timmport check` has shown, without anybody's weights. tools/coverage.py writes this file.

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


def rows_of(found: Check, today: str) -> list[Row]:
    """A row for each case."""
    sha256 = digest_of(found.mapping.path)
    return [
        {
            "family": found.mapping.name,
            "reference": reference_of(case),
            "target": case.target,
            "outcome": case.outcome,
            "worst_error": case.worst_error,
            "smallest_margin": case.smallest_margin,
            "versions": versions_of(case),
            "date": today,
            "family_sha256": sha256,
        }
        for case in found.cases
    ]


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reference_of(case: Case) -> str:
    """The runner and what is compared: an output, or the first and the last of several."""
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
    return tuple(row[key] for key in ("family", "reference", "target", "family_sha256"))


def _better(shown: Row | None, row: Row) -> Row:
    proved = shown is not None and shown["outcome"] in ("exact", "nearly")
    kept = row["outcome"] == "not installed" or (row["outcome"] == "closes" and proved)
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


def render(results: Mapping[str, Iterable[Row]]) -> str:
    """COVERAGE.md."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in (row for rows in results.values() for row in rows):
        versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
        figures = figure(row["worst_error"], ".1e"), figure(row["smallest_margin"], ".0e")
        cells = (row["family"], row["reference"], row["target"], row["outcome"], *figures, versions, row["date"])
        lines.append(f"| {' | '.join(cells)} |".replace("  ", " "))
    lines += ["", "## Refused", ""]
    lines += [f"- {family}: {one.reason}" for family in find_mappings() for one in load_mapping(family).refuse]
    return HEAD + "\n".join(lines) + "\n"


def figure(value: float | None, form: str) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:{form}}"


def run(families: Iterable[str], largest: float) -> Iterator[Check]:
    """The checks, on workers that they share."""
    with Workers() as workers:
        for family in families:
            tell = partial(print, f"{family}:", flush=True)
            if largest and all_known(family):
                tell("all of it is known")
            else:
                yield check(family, everything=largest > 0, largest=largest, workers=workers, progress=tell)


def all_known(family: str) -> bool:
    """Whether parity has been shown of every target, for the mapping as it stands."""
    rows, sha256 = read_results().get(family, []), digest_of(load_mapping(family).path)
    return all(row["outcome"] in ("exact", "nearly") and row["family_sha256"] == sha256 for row in rows)


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
        rows = rows_of(found, date.today().isoformat())
        write_results(family, merge(read_results().get(family, []), rows))
        worst = max(worst, found.exit_code)
    results = read_results()
    TABLE.write_text(render(results), "utf-8")
    print(f"{TABLE.name}: {sum(map(len, results.values()))} rows")
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
