"""Files that something has happened to, for tests of what reads them."""

from __future__ import annotations

from hypothesis import strategies as st

PIECES = [
    *(b'"', b"{", b"}", b"[", b",", b"7", b" ", b"\\", b"\n", b"\r", b"\0", b"\xff"),
    *(b"null", b"NaN", b"1e999", b'"\\ud800"', b"\xef\xbb\xbf", b"\\u0000"),
]


def changed_bytes(data: st.DataObject, content: bytes) -> bytes:
    """The content with one to four places where bytes were changed, taken out or put in."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(changed)))
        taken = data.draw(st.integers(0, 8))
        changed[start : start + taken] = data.draw(st.one_of(st.binary(max_size=6), st.sampled_from(PIECES)))
    return bytes(changed)
