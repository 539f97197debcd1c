"""The encoder of a served checkpoint, where another server makes its features."""

from __future__ import annotations

import logging
from typing import NamedTuple

from plm.backbones import EncoderError, Patience, RemoteEncoder
from plm.method import PersonalizationMethod

PATIENCE = Patience(retries=2, timeout=10.0, longest_wait=5.0)
"""How long clients wait for features."""
log = logging.getLogger("plm.serving")


class EncoderServer(NamedTuple):
    """Where features come from."""

    url: str
    model: str
    is_unchecked: bool = False
    """Whether features are used that nobody has compared."""

    def attach(self, method: PersonalizationMethod) -> None:
        """Let a loaded method read features of this server, after a comparison with its own encoder.

        Raises:
            ValueError: If it reads no features, its own encoder cannot be loaded to compare, or they differ.
        """
        local = method.text_encoder.backbone
        if local.view != "features":
            raise ValueError(
                f"--encoder_url: expected a checkpoint that reads features of texts, got one of "
                f"{type(method).__name__} that reads the {local.view} of a language model of its own"
            )
        encoder = RemoteEncoder(local, method.feature_dim, self.url, self.model, self.is_unchecked, PATIENCE)
        try:
            found = encoder.agreement
        except EncoderError as error:
            raise ValueError(f"--encoder_url: {error}") from error
        if found is None:
            log.warning("nobody has compared %s at %s with the checkpoint's encoder", self.model, self.url)
        else:
            log.info("%s at %s gives the checkpoint's features: cosines from %.6f", self.model, self.url, found.cosine)
        method.text_encoder.backbone = encoder
