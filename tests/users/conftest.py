from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store may be: a file, and a new database of a real server."""
    if request.param == "sqlite":
        return str(tmp_path / "m.users.db")
    return str(request.getfixturevalue("database"))
