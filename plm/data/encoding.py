"""A table with what its texts are to a method: features from the cache, or tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from plm.backbones import Backbone, CausalLM, LatentBackbone, ReferenceLogps, TooLong
from plm.data.collate import FeaturedPairs
from plm.data.features import FeatureCache
from plm.data.files import IntArray
from plm.data.rows import SAME, FeatureRows, TokenRows
from plm.data.schema import PairTable
from plm.data.values import plain_prompt

ADVICE = "shorten them, or train the model that makes the latents with a greater max_length or with max_prompt_length"


def fitting_pairs(table: PairTable, backbone: Backbone) -> tuple[PairTable, TokenRows | None]:
    """The pairs whose texts fit the language model that reads them, and the tokens of all items; see `token_rows`.

    Where none reads them, as with encoders, that cut texts themselves, the table as it is and None.

    Raises:
        ValueError: If no pair fits.
    """
    if isinstance(backbone, CausalLM):
        return token_rows(table, backbone)
    if isinstance(backbone, LatentBackbone):
        return token_rows(table, backbone.causal_lm, ADVICE)
    return table, None


def with_features(
    table: PairTable,
    user_index: IntArray,
    read: Callable[[list[tuple[str, str]]], Any],
    read_prompts: Callable[[list[str]], Any] | None,
) -> FeaturedPairs:
    """A table with features; only texts that some pair is of are read, for others may not fit.

    Args:
        table: The pairs.
        user_index: ``(U,)`` row of every user in the training table, -1 if unseen.
        read: n texts, prompt and response -> features ``(n, D)``.
        read_prompts: n prompts -> ``(n, F)``; None = they are not wanted.
    """
    items, texts = np.unique(np.concatenate([table.chosen, table.rejected])), table.texts()
    rows = _spread(_array(read([texts[item] for item in items])), items, len(table.items))
    prompts = None
    if read_prompts is not None:
        asked = np.unique(table.items[items, 0])
        found = _array(read_prompts([table.prompts[prompt] for prompt in asked]))
        prompts = FeatureRows(_spread(found, asked, len(table.prompts)))
    return FeaturedPairs(table, FeatureRows(rows), prompts, user_index)


def _spread(values: npt.NDArray[np.float32], rows: IntArray, num_rows: int) -> npt.NDArray[np.float32]:
    """Features ``(n, D)`` of some rows ``(n,)`` -> ``(num_rows, D)``, nan for the others, which no pair refers to."""
    if len(rows) == num_rows:
        return values
    out = np.full((num_rows, values.shape[1]), np.nan, dtype=np.float32)
    out[rows] = values
    return out


def featured_pairs(
    table: PairTable,
    user_index: IntArray,
    backbone: Backbone,
    cache_dir: str,
    *,
    prompt_features: bool = False,
    reference_logps: bool = False,
    tokens: TokenRows | None = None,
) -> FeaturedPairs:
    """A table with the features of its texts, or with their tokens where the backbone is a language model.

    Args:
        table: The pairs.
        user_index: ``(U,)`` row of every user in the training table, -1 if unseen.
        backbone: What turns texts into features or tokens.
        cache_dir: Folder of the feature cache.
        prompt_features: Whether prompts alone are wanted, too.
        reference_logps: Whether log-probabilities under the untrained language model are wanted, too.
        tokens: The tokens of the table, where `fitting_pairs` has been asked already.

    Raises:
        ValueError: If features have another shape than the backbone promises, or no pair fits the language model.
    """
    if tokens is None:
        table, tokens = fitting_pairs(table, backbone)
    if isinstance(backbone, CausalLM):
        assert tokens is not None
        if reference_logps:
            reference = ReferenceLogps(backbone.spec())
            tokens = replace(tokens, ref_logps=_array(FeatureCache(reference, cache_dir).features(table.texts()))[:, 0])
            reference.release()
        return FeaturedPairs(table, tokens, tokens.prompts_alone() if prompt_features else None, user_index)
    cache = FeatureCache(backbone, cache_dir)

    def read(texts: list[tuple[str, str]]) -> npt.NDArray[np.float32]:
        features = _array(cache.features(texts))
        if features.shape != (len(texts), backbone.feature_dim):
            raise ValueError(
                f"expected features of shape {(len(texts), backbone.feature_dim)} from {type(backbone).__name__}, "
                f"got {features.shape}; correct its feature_dim or clear the cache {cache_dir}"
            )
        return features

    def read_prompts(prompts: list[str]) -> Any:
        reader = backbone.prompt_backbone
        own = cache if reader is backbone else FeatureCache(reader, cache_dir)
        found = own.features([("", plain_prompt(prompt)) for prompt in prompts])
        reader.release()
        return found

    data = with_features(table, user_index, read, read_prompts if prompt_features else None)
    backbone.release()
    return data


def _array(features: Any) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = np.asarray(features)
    return array


def token_rows(
    table: PairTable,
    tokenizer: CausalLM,
    advice: str = "raise data.backbone.init_args.max_length or set max_prompt_length",
) -> tuple[PairTable, TokenRows]:
    """Tokenise the items of a table and leave out pairs that do not fit; responses that were cut are warned about.

    Args:
        table: The pairs.
        tokenizer: The language model whose tokens they are.
        advice: What to do about texts that do not fit.

    Returns:
        The table without pairs whose prompt leaves no room (``dropped["too_long"]``) or whose responses differ only
        where they were cut off (``dropped["same_when_cut"]``), both with a warning, and the tokens of all items.

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
    for pair in np.flatnonzero(~unfit & cut[table.chosen] & cut[table.rejected]).tolist():
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
    reasons = {"too_long": (unfit, "their prompts leave no room for a response"), "same_when_cut": (same, SAME)}
    left = table.take(~unfit & ~same) if (unfit | same).any() else table
    for name, (which, why) in reasons.items():
        if which.any():
            first = table.position(int(np.flatnonzero(which)[0]))
            warnings.warn(
                f"{which.sum()} of {table.num_pairs} pairs are left out: {why} (the first at {first}); {advice}",
                stacklevel=2,
            )
            left.dropped[name] = int(which.sum())
    return left, rows
