"""What the texts of a table are to a method: features, or tokens.

Axes: I items, P prompts, U users, D feature width.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from plm.arrays import Float32Array, IntArray
from plm.backbones import (
    Backbone,
    CausalLM,
    EncoderError,
    LatentBackbone,
    ReferenceLogps,
    RemoteEncoder,
    TokenBackbone,
    TooLong,
)
from plm.data.collate import FeaturedPairs
from plm.data.features import FeatureCache, Filled
from plm.data.rows import BatchRows, FeatureRows, MappedRows, TokenRows
from plm.data.schema import PairTable
from plm.data.shards import FeatureDtype
from plm.data.values import plain_prompt
from plm.types import Tokens

if TYPE_CHECKING:
    from plm.data.features import Engine

TEXTS_AT_ONCE = 2**14
"""Texts that are read at once where no cache keeps their features."""
MOST_HELD = 2**30
"""Bytes of features that a fit holds in memory; more stay on the disk, and are mapped into memory."""
ADVICE = "shorten them, or train the model that makes the latents with a greater max_length or with max_prompt_length"


class TextReader(Protocol):
    """Turns texts into the features that a method reads."""

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> Tensor | Tokens:
        """Features ``(B, D)`` of B responses to B prompts."""

    def prompts(self, prompts: Sequence[str]) -> Tensor | Tokens | None:
        """Features ``(B, F)`` of B prompts alone."""


class CachedReader:
    """Reads the features of a backbone through its cache on disk.

    Args:
        backbone: What turns texts into features.
        cache_dir: Folder of the feature cache.
        dtype: Precision in which features are cached.
    """

    def __init__(self, backbone: Backbone, cache_dir: str, dtype: FeatureDtype = "float32") -> None:
        self.backbone, self.cache_dir = backbone, cache_dir
        self.cache = FeatureCache(backbone, cache_dir, dtype=dtype)

    def responses(self, prompts: Sequence[str], texts: Sequence[str], items: IntArray, num_items: int) -> BatchRows:
        """Features of n responses to n prompts as rows ``items`` ``(n,)`` of ``num_items``."""
        return _cached_rows(self.cache, list(zip(prompts, texts, strict=True)), items, num_items)

    def prompts(self, prompts: Sequence[str], rows: IntArray, num_prompts: int) -> BatchRows:
        """Features of n prompts alone as ``rows`` ``(n,)`` of ``num_prompts``."""
        backbone = self.backbone.prompt_backbone
        cache = (
            self.cache if backbone is self.backbone else FeatureCache(backbone, self.cache_dir, dtype=self.cache.dtype)
        )
        found = _cached_rows(cache, _alone(prompts), rows, num_prompts)
        backbone.release()
        return found


def _cached_rows(cache: FeatureCache, texts: list[tuple[str, str]], rows: IntArray, num_rows: int) -> BatchRows:
    """Features of n texts as ``rows`` ``(n,)`` of ``num_rows``; above `MOST_HELD` they stay on the disk."""
    if len(texts) * cache.backbone.feature_dim * 4 <= MOST_HELD:
        return _feature_rows(cache.features(texts).numpy(), rows, num_rows)
    found = cache.mapped(texts)
    place = np.full((num_rows, 2), -1, dtype=np.int32)
    place[rows] = found.place
    return MappedRows(found.shards, place)


def drop_unreadable(table: PairTable, backbone: Backbone) -> tuple[PairTable, TokenRows | None]:
    """Leave out pairs whose texts do not fit the language model that reads them.

    Returns:
        The other pairs and the tokens of all items, see `token_rows`; where no language model reads them, as with
        encoders, which cut texts themselves, the table as it is and None.

    Raises:
        ValueError: If no pair fits.
    """
    if isinstance(backbone, TokenBackbone):
        return token_rows(table, backbone)
    if isinstance(backbone, LatentBackbone):
        return token_rows(table, backbone.causal_lm, ADVICE)
    return table, None


def encode_pairs(
    table: PairTable,
    backbone: Backbone,
    reader: TextReader | CachedReader | None = None,
    *,
    user_index: IntArray | None = None,
    prompt_features: bool = False,
    tokens: TokenRows | None = None,
) -> FeaturedPairs:
    """A table with features of its texts where a reader gives them, else with their tokens.

    Only texts of some pair are read, for others may not fit.

    Args:
        table: The pairs.
        backbone: What reads the texts, or cuts them into tokens; its weights are freed once a cache holds the features.
        reader: What gives features; None = the method reads tokens, of a `TokenBackbone`.
        user_index: ``(U,)`` row of every user in the training table, -1 if unseen; None = all users are new.
        prompt_features: Whether prompts alone are wanted, too.
        tokens: The tokens of the table, where `drop_unreadable` has been called already.

    Raises:
        ValueError: If no pair fits the language model.
    """
    if tokens is None:
        table, tokens = drop_unreadable(table, backbone)
    if user_index is None:
        user_index = np.full(table.num_users, -1, dtype=np.int64)
    if reader is None:
        if tokens is None:
            raise ValueError(f"expected a backbone that gives tokens, got {type(backbone).__name__}")
        return FeaturedPairs(table, tokens, tokens.prompts_alone() if prompt_features else None, user_index)
    items, prompt, prompts, responses = _texts_of_pairs(table)
    if isinstance(reader, CachedReader):
        of_items = reader.responses(prompts, responses, items, len(table.items))
    else:
        of_items = _feature_rows(_read(reader, prompts, responses), items, len(table.items))
    _warn_of_equal_features(table, of_items)
    of_prompts: BatchRows | None = None
    if prompt_features and tokens is not None and isinstance(backbone.prompt_backbone, TokenBackbone):
        of_prompts = tokens.prompts_alone()
    elif prompt_features:
        rows, count = np.unique(prompt), len(table.prompts)
        alone = [table.prompts[row] for row in rows.tolist()]
        if isinstance(reader, CachedReader):
            of_prompts = reader.prompts(alone, rows, count)
        else:
            read = reader.prompts(alone)
            assert isinstance(read, Tensor)
            of_prompts = _feature_rows(read.cpu().numpy(), rows, count)
    if isinstance(reader, CachedReader):  # it has read all that it is going to
        backbone.release()
    return FeaturedPairs(table, of_items, of_prompts, user_index)


def fill_cache(
    table: PairTable,
    backbone: Backbone,
    cache_dir: str,
    share: tuple[int, int],
    *,
    prompt_features: bool,
    reference_logps: bool,
    server: RemoteEncoder | None,
    engine: Engine | None,
    dtype: FeatureDtype,
) -> dict[str, Filled]:
    """Encode what `encode_pairs` and `with_reference_logps` read through caches and is not there yet.

    Args:
        table: The pairs, of which `drop_unreadable` has left out some.
        backbone: What reads the texts, or cuts them into tokens; its weights are freed.
        cache_dir: Folder of the feature cache.
        share: ``(i, n)``, the i-th of n equal shares of the texts: see `FeatureCache.fill`.
        prompt_features: Whether prompts alone are wanted, too.
        reference_logps: Whether log-probabilities under the untrained model are.
        server: What encodes in the place of the backbone.
        engine: What has other processes encode.
        dtype: Precision in which features are cached; log-probabilities are in float32.

    Returns:
        ``responses``, ``prompts`` and ``reference``, those that are read -> what was done.

    Raises:
        ValueError: If none is, or the server fails or gives other features than the backbone.
    """
    if server is not None and backbone.view != "features":
        raise ValueError(
            f"--encoder_url: expected a backbone that gives features of texts, got {type(backbone).__name__}, whose "
            f"{backbone.view} no server of embeddings gives"
        )
    parts: dict[str, tuple[Backbone, list[tuple[str, str]]]] = {}
    if not isinstance(backbone, TokenBackbone):
        _, prompt, prompts, responses = _texts_of_pairs(table)
        parts["responses"] = backbone, list(zip(prompts, responses, strict=True))
        if prompt_features and not isinstance(backbone.prompt_backbone, TokenBackbone):
            rows = np.unique(prompt).tolist()
            parts["prompts"] = backbone.prompt_backbone, _alone([table.prompts[row] for row in rows])
    elif reference_logps:
        parts["reference"] = ReferenceLogps(backbone.spec()), table.texts()
    else:
        raise ValueError(
            f"expected a backbone whose features are cached, got {type(backbone).__name__}, whose tokens are not; its "
            "log-probabilities are, with data.reference_logps"
        )
    filled = {}
    for name, (encoder, texts) in parts.items():
        try:
            kept_in: FeatureDtype = "float32" if name == "reference" else dtype
            filled[name] = FeatureCache(encoder, cache_dir, server, kept_in).fill(texts, share, engine)
        except EncoderError as error:
            raise ValueError(f"--encoder_url: {error}; what was encoded is kept") from error
        encoder.release()
    return filled


def _texts_of_pairs(table: PairTable) -> tuple[IntArray, IntArray, list[str], list[str]]:
    """The items ``(n,)`` that some pair refers to, their prompts ``(n,)`` as rows and texts, and their responses."""
    items = np.unique(np.concatenate([table.chosen, table.rejected]))
    prompt, response = table.items[items].T
    prompts = [table.prompts[row] for row in prompt.tolist()]
    return items, prompt, prompts, [table.responses[row] for row in response.tolist()]


def _alone(prompts: Sequence[str]) -> list[tuple[str, str]]:
    """Prompts without responses, as texts of a cache."""
    return [("", plain_prompt(prompt)) for prompt in prompts]


def _read(reader: TextReader, prompts: list[str], texts: list[str]) -> Float32Array:
    """Features ``(n, D)`` of n texts, which are read in parts, so that they are in memory once."""
    features = np.zeros((0, 0), dtype=np.float32)
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        rows = slice(start, start + TEXTS_AT_ONCE)
        part = reader(prompts[rows], texts[rows])
        assert isinstance(part, Tensor)
        if not start:
            features = np.empty((len(texts), part.shape[1]), dtype=np.float32)
        features[rows] = part.cpu().numpy()
    return features


def _feature_rows(values: Float32Array, rows: IntArray, num_rows: int) -> FeatureRows:
    """Features ``(n, D)`` of some rows ``(n,)`` -> ``(num_rows, D)``, nan for the others, which no pair refers to."""
    if len(rows) == num_rows:
        return FeatureRows(values)
    out = np.full((num_rows, values.shape[1]), np.nan, dtype=np.float32)
    out[rows] = values
    return FeatureRows(out)


def _warn_of_equal_features(table: PairTable, items: BatchRows) -> None:
    """Warn of pairs whose two responses are one to the method: whatever it has learned, it is right in half of them.

    Args:
        table: The pairs.
        items: Features ``(I, D)`` of its items.
    """
    codes = _codes(items, len(table.items))
    alike = np.flatnonzero(codes[table.chosen] == codes[table.rejected])  # few: others need not be compared as a whole
    sides = items.gather(table.chosen[alike]), items.gather(table.rejected[alike])
    same = alike[(_numbers(sides[0]) == _numbers(sides[1])).all(1)]
    if len(same):
        warnings.warn(
            f"{len(same)} of {table.num_pairs} pairs have the same features on both sides (the first at "
            f"{table.position(int(same[0]))}): the backbone sees no difference, as where it cuts long texts, so no "
            "method can tell them apart",
            stacklevel=3,
        )


def _codes(items: BatchRows, count: int) -> npt.NDArray[np.uint64]:
    """One number for each row of features ``(I, D)``, the same for equal rows: a sum of its bits times odd numbers."""
    factors = np.random.default_rng(0).integers(2**62, size=items.width, dtype=np.uint64) * 2 + 1
    codes = np.empty(count, dtype=np.uint64)
    for start in range(0, count, TEXTS_AT_ONCE):  # bounds the memory of 64 bits
        part = np.arange(start, min(start + TEXTS_AT_ONCE, count))
        rows = _numbers(items.gather(part)) + np.float32(0)  # -0 is 0
        codes[part] = (rows.view(np.uint32) * factors).sum(1)
    return codes


def _numbers(features: Tensor | Tokens) -> Float32Array:
    """Gathered features ``(B, D)``."""
    assert isinstance(features, Tensor)
    return features.numpy()


def with_reference_logps(tokens: TokenRows, table: PairTable, causal_lm: CausalLM, cache_dir: str) -> TokenRows:
    """Tokens with the log-probability of every response under the untrained language model, cached."""
    reference = ReferenceLogps(causal_lm.spec())
    logps = FeatureCache(reference, cache_dir).features(table.texts())[:, 0]
    reference.release()
    return replace(tokens, ref_logps=logps.numpy())


def token_rows(
    table: PairTable,
    tokenizer: TokenBackbone,
    advice: str = "raise data.backbone.init_args.max_length or set max_prompt_length",
) -> tuple[PairTable, TokenRows]:
    """Tokenise the items of a table and leave out pairs that do not fit; responses that were cut are warned about.

    Args:
        table: The pairs.
        tokenizer: What cuts them into tokens.
        advice: What to do about texts that do not fit.

    Returns:
        The table without pairs whose prompt leaves no room (``dropped["too_long"]``) or whose responses are the
        same tokens, as they are (``dropped["same_tokens"]``) or where they were cut off (``dropped["same_when_cut"]``),
        each with a warning, and the tokens of all items.

    Raises:
        ValueError: For a response without tokens or an id outside the vocabulary, with the position of its pair; or if
            no pair fits.
    """
    prompts: list[npt.NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)] * len(table.prompts)
    responses: list[npt.NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)] * len(table.items)
    fits = np.ones(len(table.items), dtype=bool)
    cut = np.zeros(len(table.items), dtype=bool)
    for item, (prompt, text) in enumerate(table.texts()):
        try:
            (before, after), num_cut = tokenizer.cut_completion(prompt, text)
        except TooLong:
            fits[item] = False
            continue
        except ValueError as error:
            pair = int(np.flatnonzero((table.chosen == item) | (table.rejected == item))[0])
            raise ValueError(f"{table.position(pair)}: {error}") from error
        prompts[table.items[item, 0]] = np.array(before, dtype=np.int32)
        responses[item] = np.array(after, dtype=np.int32)
        cut[item] = num_cut > 0
    rows = TokenRows(prompts, responses, table.items[:, 0])
    unfit = ~(fits[table.chosen] & fits[table.rejected])
    same = np.zeros(table.num_pairs, dtype=bool)
    for pair in np.flatnonzero(~unfit).tolist():
        same[pair] = np.array_equal(responses[table.chosen[pair]], responses[table.rejected[pair]])
    if not (~unfit & ~same).any():
        first = table.position(0)
        raise ValueError(f"expected prompts that leave room for a response, got none (the first at {first}); {advice}")
    if cut.any():
        first = table.position(int(np.flatnonzero(cut[table.chosen] | cut[table.rejected])[0]))
        warnings.warn(
            f"{cut.sum()} of {len(table.items)} responses are cut off where the model can read no more (the first at "
            f"{first}); {advice}",
            stacklevel=2,
        )
    both_cut = cut[table.chosen] & cut[table.rejected]
    reasons = {
        "too_long": (unfit, "their prompts leave no room for a response", advice),
        "same_when_cut": (same & both_cut, "their responses differ only where they are cut off", advice),
        "same_tokens": (
            same & ~both_cut,
            "their responses are the same tokens",
            "the model cannot tell them apart: look at what its tokenizer and template leave out",
        ),
    }
    left = table.take(~unfit & ~same) if (unfit | same).any() else table
    for name, (which, why, what_to_do) in reasons.items():
        if which.any():
            first = table.position(int(np.flatnonzero(which)[0]))
            warnings.warn(
                f"{which.sum()} of {table.num_pairs} pairs are left out: {why} (the first at {first}); {what_to_do}",
                stacklevel=2,
            )
            left.dropped[name] = int(which.sum())
    return left, rows
