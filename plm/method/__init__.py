"""PersonalizationMethod and the bases of methods that own a network: `network`, `policy`, `live`.

Only the protocol is imported here; the other modules read language models and take longer to import.
"""

from __future__ import annotations

from plm.method.arguments import constructor_arguments
from plm.method.base import CHECKPOINT_KEY, PersonalizationMethod

__all__ = ["CHECKPOINT_KEY", "PersonalizationMethod", "constructor_arguments"]
