"""A table with what its texts are to a method: features from the cache, or tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from plm.backbones import Backbone, CausalLM, LatentBackbone, ReferenceLogps, TooLong
from plm.data.collate import FeaturedPairs
from plm.data.features import FeatureCache
from plm.data.files import IntArray
from plm.data.rows import FeatureRows, TokenRows, token_rows
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
        return token_rows(table, backbone, TooLong)
    if isinstance(backbone, LatentBackbone):
        return token_rows(table, backbone.causal_lm, TooLong, ADVICE)
    return table, None


def items_in_use(table: PairTable) -> IntArray:
    """Rows of the items that some pair is of; the texts of others may not fit."""
    return np.unique(np.concatenate([table.chosen, table.rejected]))


def spread(values: npt.NDArray[np.float32], rows: IntArray, num_rows: int) -> npt.NDArray[np.float32]:
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
    items, texts = items_in_use(table), table.texts()
    features = _array(cache.features([texts[item] for item in items]))
    if features.shape != (len(items), backbone.feature_dim):
        raise ValueError(
            f"expected features of shape {(len(items), backbone.feature_dim)} from {type(backbone).__name__}, "
            f"got {features.shape}; correct its feature_dim or clear the cache {cache_dir}"
        )
    prompts = None
    if prompt_features:
        reader = backbone.prompt_backbone
        cache = cache if reader is backbone else FeatureCache(reader, cache_dir)
        asked = np.unique(table.items[items, 0])
        read = _array(cache.features([("", plain_prompt(table.prompts[prompt])) for prompt in asked]))
        prompts = FeatureRows(spread(read, asked, len(table.prompts)))
        reader.release()
    backbone.release()
    return FeaturedPairs(table, FeatureRows(spread(features, items, len(table.items))), prompts, user_index)


def _array(features: Any) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = np.asarray(features)
    return array
