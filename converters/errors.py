"""The errors that a user can cause and mend.

    ConverterError            one line: the file, the tensor, what is wrong, the cure
    |-- CheckpointError       the source cannot be read
    |   |-- UnknownFormat     no reader knows these bytes
    |   |-- DamagedCheckpoint truncated, a checksum that differs, sizes that contradict each other
    |   `-- UnsafeCheckpoint  reading it would run code, leave the source, or exhaust memory
    |-- MappingError          a mapping file is wrong, at a line
    |-- PlanError             no closed plan: every problem at once
    |-- NotExpressible        the source computes a function that timm does not have
    |-- TargetError           timm has no such model, or it does not take these arguments
    |-- OutputError           the destination cannot be written
    `-- ReferenceFailed       the source framework's model could not be run

The command line turns each into its text and exit code 1; anything else that escapes is a bug and
keeps its traceback.
"""

from __future__ import annotations

import os

__all__ = [
    "CheckpointError",
    "ConverterError",
    "DamagedCheckpoint",
    "MappingError",
    "NotExpressible",
    "OutputError",
    "PlanError",
    "ReferenceFailed",
    "TargetError",
    "UnknownFormat",
    "UnsafeCheckpoint",
    "printable",
]


class ConverterError(Exception):
    """A fault in one line.

    >>> print(DamagedCheckpoint("its CRC differs", file="swin.pth", tensor="norm.weight", cure="fetch it again"))
    swin.pth: norm.weight: its CRC differs; fetch it again
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        cure: str | None = None,
    ) -> None:
        self.problem, self.file, self.tensor, self.cure = problem, file, tensor, cure
        place = [printable(os.fspath(part)) for part in (file, tensor) if part is not None]
        super().__init__(": ".join([*place, problem]) + (f"; {cure}" if cure else ""))


class CheckpointError(ConverterError):
    """The source cannot be read."""


class UnknownFormat(CheckpointError):
    """No reader knows these bytes."""


class DamagedCheckpoint(CheckpointError):
    """The bytes contradict themselves."""


class UnsafeCheckpoint(CheckpointError):
    """Reading would run code, leave the source, or exhaust memory."""


class MappingError(ConverterError):
    """A mapping file is wrong; the message begins with `file:line`."""


class PlanError(ConverterError):
    """No plan closes; the text lists every problem and may take many lines."""


class NotExpressible(ConverterError):
    """The source computes a function that timm does not have."""


class TargetError(ConverterError):
    """timm has no such model, or it does not take these arguments."""


class OutputError(ConverterError):
    """The destination cannot be written."""


class ReferenceFailed(ConverterError):
    """The source framework's model could not be run."""


def printable(name: str, limit: int = 200) -> str:
    r"""A name from a file, made safe for a terminal: control and bidirectional characters escaped, cut at `limit`.

    >>> printable("\x1b[31mred")
    '\\x1b[31mred'
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name[: limit + 1])
    return text if len(name) <= limit else text[:limit] + "..."
