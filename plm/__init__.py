"""plm: train, judge, adapt and serve preference models that know each of their users.

The public names below are imported on first use, so that ``import plm`` and the light commands never wait for torch.
Every installed method is a name of plm as well, by its entry point.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the table below as imports that a type checker follows; a test compares the two
    from plm.audit.models import compare as compare
    from plm.checkpoint import load_method as load_method
    from plm.data.datamodule import PreferenceDataModule as PreferenceDataModule
    from plm.data.schema import read_pairs as read_pairs
    from plm.fitting import Run as Run
    from plm.fitting import fit as fit
    from plm.generation import best_of_n as best_of_n
    from plm.generation import sample as sample
    from plm.learned_rewards import reward_func as reward_func
    from plm.method import PersonalizationMethod as PersonalizationMethod
    from plm.methods.bradley_terry import BradleyTerry as BradleyTerry
    from plm.methods.clap import CLaP as CLaP
    from plm.methods.latent_dpo import LatentDPO as LatentDPO
    from plm.methods.lora_dpo import LoRADPO as LoRADPO
    from plm.methods.lore import LoRe as LoRe
    from plm.methods.lore import PublishedLoRe as PublishedLoRe
    from plm.methods.pal import PAL as PAL
    from plm.methods.palm import PALM as PALM
    from plm.methods.sft import SFT as SFT
    from plm.methods.vpl import VPL as VPL
    from plm.types import Context as Context
    from plm.types import PreferenceBatch as PreferenceBatch
    from plm.types import Tokens as Tokens
    from plm.types import UserState as UserState
    from plm.users import UserStore as UserStore

_MODULE_OF = {
    "BradleyTerry": "plm.methods.bradley_terry",
    "CLaP": "plm.methods.clap",
    "Context": "plm.types",
    "LatentDPO": "plm.methods.latent_dpo",
    "LoRADPO": "plm.methods.lora_dpo",
    "LoRe": "plm.methods.lore",
    "PAL": "plm.methods.pal",
    "PALM": "plm.methods.palm",
    "PersonalizationMethod": "plm.method",
    "PreferenceBatch": "plm.types",
    "PreferenceDataModule": "plm.data.datamodule",
    "PublishedLoRe": "plm.methods.lore",
    "Run": "plm.fitting",
    "SFT": "plm.methods.sft",
    "Tokens": "plm.types",
    "UserState": "plm.types",
    "UserStore": "plm.users",
    "VPL": "plm.methods.vpl",
    "best_of_n": "plm.generation",
    "compare": "plm.audit.models",
    "fit": "plm.fitting",
    "load_method": "plm.checkpoint",
    "read_pairs": "plm.data.schema",
    "reward_func": "plm.learned_rewards",
    "sample": "plm.generation",
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    """Import a public name, or an installed method, from the module that defines it."""
    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
    elif not name.startswith("_") and name in _installed():
        value = _installed()[name].load()
    else:
        raise AttributeError(f"module 'plm' has no attribute {name!r}")
    globals()[name] = value
    return value


@cache  # who parses a recipe asks for every class whether it is a name of plm, and reading takes tens of milliseconds
def _installed() -> dict[str, Any]:
    """Entry points of installed methods by name."""
    from importlib.metadata import entry_points  # slow to import

    installed = [*entry_points(group="plm.methods")]  # a list, as since Python 3.12 these have no places
    return {entry.name: entry for entry in reversed(installed)}  # the first of a name


def __dir__() -> list[str]:
    """List the lazy names too."""
    return sorted({*globals(), *__all__})
