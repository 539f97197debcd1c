"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from plm.atomic import json_line, replace, whole_file, write_json, write_text


def test_a_block_that_fails_leaves_the_former_file(tmp_path: Path) -> None:
    write_text(tmp_path / "deep/file.txt", "before")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "deep/file.txt") as file:
        file.write(b"half")
        raise RuntimeError
    assert (tmp_path / "deep/file.txt").read_text() == "before"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file.txt"]


def test_links_and_permissions_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("before")
    real.chmod(0o600)
    link.symlink_to(real)
    write_text(link, "after")
    assert link.is_symlink() and real.read_text() == "after"
    assert stat.S_IMODE(real.stat().st_mode) == 0o600


def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "text")
    reader.join(10)
    assert read == ["text"] and pipe.is_fifo()


def test_a_folder_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the name of a file, got the folder"):
        write_text(tmp_path, "text")


def test_folders_replace_what_holds_nothing(tmp_path: Path) -> None:
    write_json(tmp_path / "part/a/b.json", {"x": float("nan")})
    replace(tmp_path / "part", tmp_path / "whole")
    assert (tmp_path / "whole/a/b.json").read_text() == '{\n  "x": null\n}\n'
    write_text(tmp_path / "part/c.txt", "c")
    with pytest.raises(OSError):
        replace(tmp_path / "part", tmp_path / "whole")


def test_keys_are_what_json_makes_of_them_beside_numbers_that_it_lacks() -> None:
    assert json_line({"a": {True: 1.0, None: float("nan")}}) == '{"a": {"true": 1.0, "null": null}}\n'
    with pytest.raises(ValueError, match="column 'a'"):
        json_line({"a": {b"x": float("nan")}})
