"""Write constraints.txt: the exact versions of everything that `timmport[all,dev]` has pulled into this environment.

Run it in the environment in which the tests have just passed.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

OLDEST = ("3.10", "3.11", "3.12")  # a release that needs a later Python is no constraint on an earlier one


def main() -> None:
    found: dict[str, str] = {}
    visit("timmport", {"all", "dev"}, found)
    found.pop("timmport")
    path = Path(__file__).parents[1] / "constraints.txt"
    head = "# What the tests passed with, on Linux and Python 3.11; tools/write_constraints.py writes this file.\n"
    path.write_text(head + "".join(f"{line}\n" for _, line in sorted(found.items())))
    print(f"{path.name}: {len(found)} packages")


def visit(name: str, extras: set[str], found: dict[str, str]) -> None:
    """Collect a distribution and whatever it requires here."""
    try:
        dist = distribution(name)
    except PackageNotFoundError:
        return  # required on other platforms only
    key = re.sub(r"[-_.]+", "-", name).lower()
    known = key in found
    found[key] = f"{key}=={dist.version.partition('+')[0]}{marker(dist.metadata['Requires-Python'])}"
    for text in dist.requires or ():
        requirement = Requirement(text)
        wanted = [
            extra for extra in ("", *extras) if not requirement.marker or requirement.marker.evaluate({"extra": extra})
        ]
        if wanted and (not known or extras):
            visit(requirement.name, set(requirement.extras), found)


def marker(requires_python: str | None) -> str:
    """`; python_version >= "3.11"` where a release does not support the oldest Python that the project does."""
    allowed = SpecifierSet(requires_python or "")
    first = next((version for version in OLDEST if f"{version}.99" in allowed), OLDEST[0])
    return "" if first == OLDEST[0] else f' ; python_version >= "{first}"'


if __name__ == "__main__":
    main()
