"""What the tests of parity share: workers, which import a framework once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from converters.verifier.worker import Workers


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    with Workers() as kept:
        yield kept
