"""Reports: what was found and done, for a terminal (`terminal`), for programs (`documents`), and as files.

From a verified folder's documents (`dossier`) come a web page (`html`, drawn by `charts`), JUnit XML (`junit`) and
a folder that repeats the verification elsewhere (`repro`).
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_reports"]


def write_reports(
    directory: Path,
    recording: Path,
    *,
    html: Path | None = None,
    junit: Path | None = None,
    repro: Path | None = None,
) -> None:
    """Write those of the files on a verified folder that are given a path; `recording` is what `repro` repeats.

    Raises ConverterError.
    """
    if html:
        from converters.reports.html import write_html

        write_html(directory, html)
    if junit:
        from converters.reports.junit import write_junit

        write_junit([directory], junit)
    if repro:
        from converters.reports.repro import write_repro

        write_repro(directory, recording, repro)
