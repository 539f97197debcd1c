"""Texts to features: what a frozen model makes of a response."""

from __future__ import annotations

from plm.backbones.backbone import Backbone, Key
from plm.backbones.hashing import HashingBackbone
from plm.backbones.huggingface import HFBackbone

__all__ = ["Backbone", "HFBackbone", "HashingBackbone", "Key"]
