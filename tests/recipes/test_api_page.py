"""docs/api.md: its Python runs as it stands, on a small file of pairs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text(encoding="utf-8")
SIDES = ("a joke about cats", "a study of cats")


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_of_ones_own_fits_tests_and_keeps_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Users alternate between two tastes, which the loaded method knows apart."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # where the cache of features is
    rows = [
        {
            "user_id": f"user-{user}",
            "prompt": f"question {row}",
            "chosen": f"{SIDES[user % 2]} and {row}",
            "rejected": f"{SIDES[1 - user % 2]} and {row}",
        }
        for user in range(20)
        for row in range(12)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "api"}
    exec(compile(block, "docs/api.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "Test, 95% intervals over users" in shown and "unseen" in shown
    served = names["served"]
    for user in ("user-0", "user-1"):
        assert user in served.users
    jokes, studies = (served.score(SIDES, user_id=user) for user in ("user-0", "user-1"))
    assert jokes[0] > jokes[1] and studies[0] < studies[1]
