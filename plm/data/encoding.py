"""A table with what its texts are to a method: features from the cache, or tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from plm.backbones import Backbone, CausalLM, ReferenceLogps, TooLong
from plm.data.collate import FeaturedPairs
from plm.data.features import FeatureCache
from plm.data.files import IntArray
from plm.data.rows import FeatureRows, TokenRows, token_rows
from plm.data.schema import PairTable
from plm.data.values import plain_prompt


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
        tokens: The tokens of the table, where they are known already.

    Raises:
        ValueError: If features have another shape than the backbone promises, or no pair fits the language model.
    """
    if isinstance(backbone, CausalLM):
        if tokens is None:
            table, tokens = token_rows(table, backbone, TooLong)
        if reference_logps:
            reference = ReferenceLogps(backbone.spec())
            tokens = replace(tokens, ref_logps=_array(FeatureCache(reference, cache_dir).features(table.texts()))[:, 0])
            reference.release()
        return FeaturedPairs(table, tokens, tokens.prompts_alone() if prompt_features else None, user_index)
    cache = FeatureCache(backbone, cache_dir)
    features = _array(cache.features(table.texts()))
    if features.shape != (len(table.items), backbone.feature_dim):
        raise ValueError(
            f"expected features of shape {(len(table.items), backbone.feature_dim)} from {type(backbone).__name__}, "
            f"got {features.shape}; correct its feature_dim or clear the cache {cache_dir}"
        )
    prompts = None
    if prompt_features:
        reader = backbone.prompt_backbone
        cache = cache if reader is backbone else FeatureCache(reader, cache_dir)
        prompts = FeatureRows(_array(cache.features([("", plain_prompt(prompt)) for prompt in table.prompts])))
        reader.release()
    backbone.release()
    return FeaturedPairs(table, FeatureRows(features), prompts, user_index)


def _array(features: Any) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = np.asarray(features)
    return array
