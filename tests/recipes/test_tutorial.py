"""docs/tutorial.md: its commands and its Python run as they stand, and do what the text says, on fewer users."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from plm.cli import main

PAGE = (Path(__file__).parents[2] / "docs/tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python)?\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
FEWER = (
    "--data.source.init_args.num_users 80 --data.source.init_args.pairs_per_user 40 --trainer.max_epochs 60 "
    "--trainer.check_val_every_n_epoch 20 --trainer.enable_progress_bar false --data.repeats 1 "
    "--metrics.num_resamples 50"
)


def test_the_tutorial_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLM_FIT__DATA__CACHE_DIR", str(tmp_path / "cache"))
    printed: dict[str, list[str]] = {}
    for language, block in BLOCKS:
        if language:
            exec(compile(block, "docs/tutorial.md", "exec"), {"__name__": "tutorial"})
            continue
        for name, content in re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END\n", block, re.MULTILINE | re.DOTALL):
            Path(name).write_text(content, encoding="utf-8")
        for command in re.findall(r"^plm (.+)$", block, re.MULTILINE):
            verb, *options = shlex.split(command)
            if verb == "serve":
                assert Path(options[options.index("--pool") + 1]).is_file() and Path(options[1]).is_file()
                continue
            capsys.readouterr()
            monkeypatch.setattr("sys.argv", ["plm"])
            assert main([verb, *options, *(FEWER.split() if verb == "fit" else [])]) == 0
            printed.setdefault(verb, []).append(capsys.readouterr().out)
    before, after = ([json.loads(line) for line in out.splitlines()] for out in printed["score"])
    assert [row["user_known"] for row in before + after] == [False, False, True, True]
    leads = [joke["reward"] - sober["reward"] for joke, sober in (before, after)]
    assert leads[1] > leads[0]
    assert json.loads(printed["query"][0])["information"] > 0
    assert json.loads(printed["users"][0])["was_stored"] is True
    assert {"metrics.json", "per_user.csv", "recipe.yaml", "splits.json", "few_shot.png"} <= {
        file.name for file in Path("runs/first").iterdir()
    }
