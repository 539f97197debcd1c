"""Hashes of content, of 64 bits where few collide, and numbering: what makes splits reproducible and fast.

Axes: N pairs, U users, P prompts, R responses, G groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from plm.arrays import BoolArray, IntArray
from plm.data.schema import PairTable

KeyArray = npt.NDArray[np.uint64]
DIGEST_BYTES = 16
Digests = npt.NDArray[np.bytes_]
"""``(N,)`` of `DIGEST_BYTES` each."""


class Keys(NamedTuple):
    """64-bit content hashes."""

    user: KeyArray
    """``(U,)`` of user ids."""
    prompt: KeyArray
    """``(P,)`` of prompts."""
    response: KeyArray
    """``(R,)`` of responses."""
    pair: KeyArray
    """``(N,)`` of (user id, prompt, chosen, rejected)."""


def content_keys(table: PairTable) -> Keys:
    """Hash users, prompts, responses and pairs by content."""
    user, prompt, response = (digest(texts) for texts in (table.user_ids, table.prompts, table.responses))
    item = mix(prompt[table.items[:, 0]], response[table.items[:, 1]])
    return Keys(user, prompt, response, mix(mix(user[table.user], item[table.chosen]), item[table.rejected]))


def pair_names(table: PairTable) -> list[str]:
    """A name of every pair by its content, the same in every file that holds the pair; a tie is another pair."""
    keys = content_keys(table).pair
    return [f"{key:016x}" for key in np.where(table.tie, mix(keys, seed_key(0)), keys).tolist()]


def digest(texts: Sequence[str]) -> KeyArray:
    """Hash texts (blake2b), the same in every process."""
    return np.frombuffer(_hashed(texts, 8), dtype="<u8").astype(np.uint64)


def in_share(keys: KeyArray, share: tuple[int, int]) -> BoolArray:
    """Whether each hash falls into the i-th of n equal ranges, ``share = (i, n)``, by its first 32 bits.

    Whatever others there are, a text belongs to the same share.
    """
    index, count = share
    within: BoolArray = ((keys >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32) == index - 1
    return within


def seed_key(seed: int) -> KeyArray:
    """Hash of a seed, ``(1,)``."""
    return digest([f"seed {seed}"])


def mix(left: KeyArray, right: KeyArray) -> KeyArray:
    """Hash two hashes into one (the finaliser of splitmix64); wraps around on purpose."""
    value = left * np.uint64(0x9E3779B97F4A7C15) + right
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: KeyArray = value ^ (value >> np.uint64(31))
    return mixed


def number_pairs(left: IntArray, right: IntArray) -> tuple[IntArray, IntArray]:
    """Number distinct (left, right): first position of each, and the number of every pair."""
    stride = int(right.max(initial=0)) + 1
    _, first, number = np.unique(left * stride + right, return_index=True, return_inverse=True)
    return first, number


def owner_of(user: IntArray, group: IntArray) -> IntArray:
    """``(G,)`` user of every group."""
    owner = np.zeros(int(group.max(initial=-1)) + 1, dtype=np.int64)
    owner[group] = user
    return owner


def position_in_run(values: IntArray) -> IntArray:
    """0, 1, 2, ... within every run of equal values: ``[7, 7, 3, 7] -> [0, 1, 0, 0]``."""
    index = np.arange(len(values))
    start = np.ones(len(values), dtype=np.bool_)
    start[1:] = values[1:] != values[:-1]
    return index - np.maximum.accumulate(np.where(start, index, 0))


def rows_of_runs(start: IntArray, end: IntArray) -> IntArray:
    """The rows of several runs, one run after the other.

    Args:
        start: ``(n,)`` first row of each run.
        end: ``(n,)`` row after its last.

    >>> rows_of_runs(np.array([3, 0, 7]), np.array([5, 1, 7])).tolist()
    [3, 4, 0]
    """
    count = end - start
    rows: IntArray = np.repeat(start - (np.cumsum(count) - count), count) + np.arange(count.sum())
    return rows


def text_digests(texts: list[str]) -> Digests:
    """Hashes of texts that no two of them share."""
    return np.frombuffer(_hashed(texts, DIGEST_BYTES), dtype=f"S{DIGEST_BYTES}")


def _hashed(texts: Sequence[str], size: int) -> bytes:
    """Hashes of so many bytes, one after the other."""
    return b"".join(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest() for text in texts)


def found_digests(stored: Digests, digests: Digests) -> IntArray:
    """Where in ``stored``, at least one hash, each of ``digests`` stands first; for one that is nowhere, some place."""
    keys, sought = leading_keys(stored), leading_keys(digests)
    order, wanted, last = np.argsort(keys, kind="stable"), np.argsort(sought), len(keys) - 1
    keys, place = keys[order], np.empty(len(sought), dtype=np.int64)
    place[wanted] = np.searchsorted(keys, sought[wanted]).clip(max=last)  # neighbours are found near each other
    others = np.flatnonzero(stored[order[place]] != digests)
    while len(others := others[keys[np.minimum(place[others] + 1, last)] == sought[others]]):
        others = others[place[others] < last]
        place[others] += 1  # several hashes begin alike
        others = others[stored[order[place[others]]] != digests[others]]
    return order[place]


def leading_keys(digests: Digests) -> KeyArray:
    """The first half of hashes ``(N,)`` as numbers, which are sorted several times faster than whole hashes."""
    return np.ascontiguousarray(digests).view(">u8").reshape(-1, DIGEST_BYTES // 8)[:, 0].astype(np.uint64)
