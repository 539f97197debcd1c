"""plm: train, judge, adapt and serve preference models that know each of their users.

The public names below are imported on first use, so that ``import plm`` and the light commands never wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from plm.checkpoint import load_method
    from plm.data.datamodule import PreferenceDataModule
    from plm.generation import best_of_n, sample
    from plm.method import PersonalizationMethod
    from plm.methods.bradley_terry import BradleyTerry
    from plm.methods.lore import LoRe
    from plm.methods.pal import PAL
    from plm.methods.palm import PALM
    from plm.methods.vpl import VPL
    from plm.types import Context, PreferenceBatch, Tokens, UserState
    from plm.users import UserStore

__all__ = [
    "PAL",
    "PALM",
    "VPL",
    "BradleyTerry",
    "Context",
    "LoRe",
    "PersonalizationMethod",
    "PreferenceBatch",
    "PreferenceDataModule",
    "Tokens",
    "UserState",
    "UserStore",
    "__version__",
    "best_of_n",
    "load_method",
    "sample",
]

_MODULE_OF = {
    "BradleyTerry": "plm.methods.bradley_terry",
    "Context": "plm.types",
    "LoRe": "plm.methods.lore",
    "PAL": "plm.methods.pal",
    "PALM": "plm.methods.palm",
    "VPL": "plm.methods.vpl",
    "PersonalizationMethod": "plm.method",
    "PreferenceBatch": "plm.types",
    "PreferenceDataModule": "plm.data.datamodule",
    "Tokens": "plm.types",
    "UserState": "plm.types",
    "UserStore": "plm.users",
    "best_of_n": "plm.generation",
    "load_method": "plm.checkpoint",
    "sample": "plm.generation",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'plm' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the lazy names too."""
    return sorted({*globals(), *__all__})
