"""PAL: Pluralistic Alignment, ideal points mixed from prototypes."""

from plm.methods.pal.live import LivePAL
from plm.methods.pal.model import PAL

__all__ = ["PAL", "LivePAL"]
