"""Log-probabilities of responses from whole logits: what policies, which never hold these, are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from plm.functional import SequenceLogps, response_logps


def sequence_logps(logits: Tensor, token: Tensor, row: Tensor, num_rows: int) -> SequenceLogps:
    """Sums over the tokens of each response, in float32 at least.

    Args:
        logits: ``(n, V)`` vocabulary scores at the places that predict a response token.
        token: ``(n,)`` int64, the token that followed.
        row: ``(n,)`` int64, the response it belongs to.
        num_rows: Number of responses.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return response_logps(logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1), row, num_rows)
