"""Texts to features, or to the tokens of a language model: the only room that knows transformers and peft."""

from __future__ import annotations

from plm.backbones.attention import Prefix
from plm.backbones.backbone import Backbone, Key, device
from plm.backbones.causal_lm import CausalLM
from plm.backbones.chat import Answer, Chat, LocalChat, Messages, RemoteChat
from plm.backbones.files import FeatureFiles
from plm.backbones.fresh import FreshCausalLM
from plm.backbones.hashing import HashingBackbone
from plm.backbones.head import TokenFacts, token_facts
from plm.backbones.huggingface import HFBackbone
from plm.backbones.latents import LatentBackbone
from plm.backbones.lora import LoRA, TargetModules
from plm.backbones.mixing import MixedWriting, mixed_logits
from plm.backbones.pieces import KeyValueMaker, first_layers, word_moments
from plm.backbones.policy import Policy, TextWriter, Writing
from plm.backbones.prefix import PrefixShape
from plm.backbones.reading import Reading, split_texts
from plm.backbones.reference import ReferenceLogps
from plm.backbones.remote import Patience, RemoteError, RemotePolicy, is_loopback, text_key
from plm.backbones.remote_encoder import GOLDEN, EncoderError, RemoteEncoder
from plm.backbones.tokens import Completion, PlainText, TokenBackbone, TooLong, batches_by_length, completion_tokens
from plm.backbones.warpers import Warpers, draw, gumbel_noise

__all__ = [
    "GOLDEN",
    "Answer",
    "Backbone",
    "CausalLM",
    "Chat",
    "Completion",
    "EncoderError",
    "FeatureFiles",
    "FreshCausalLM",
    "HFBackbone",
    "HashingBackbone",
    "Key",
    "KeyValueMaker",
    "LatentBackbone",
    "LoRA",
    "LocalChat",
    "Messages",
    "MixedWriting",
    "Patience",
    "PlainText",
    "Policy",
    "Prefix",
    "PrefixShape",
    "Reading",
    "ReferenceLogps",
    "RemoteChat",
    "RemoteEncoder",
    "RemoteError",
    "RemotePolicy",
    "TargetModules",
    "TextWriter",
    "TokenBackbone",
    "TokenFacts",
    "TooLong",
    "Warpers",
    "Writing",
    "batches_by_length",
    "completion_tokens",
    "device",
    "draw",
    "first_layers",
    "gumbel_noise",
    "is_loopback",
    "mixed_logits",
    "split_texts",
    "text_key",
    "token_facts",
    "word_moments",
]
