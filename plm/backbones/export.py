"""Rewards as Hugging Face models: a backbone and a head in one folder that needs no plm."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from plm.atomic import write_text
from plm.backbones.backbone import Backbone
from plm.backbones.huggingface import HFBackbone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plm.backbones.modeling_reward import RewardModel

_TEXT = {
    "plain": 'text = prompt + "\\n\\n" + response if prompt else response',
    "response": "text = response",
    "chat": """text = tokenizer.apply_chat_template(
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}], tokenize=False
)""",
}
_README = """---
library_name: transformers
pipeline_tag: text-classification
---

# Reward model

Exported by plm. Rewards compare responses with each other; {code}

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})
model = AutoModelForSequenceClassification.from_pretrained(FOLDER{trust}).eval()
{text}
inputs = tokenizer(text, truncation=True{special}, return_tensors="pt")
{call}
```
"""
_OWN_CODE = "`modeling_reward.py` is all the code that is needed."
_NO_CODE = """the class is one of transformers, with the
reward in `score.weight`, so that other software reads it as any reward model. It is right up to a number that all
responses share, and in the precision of the weights."""
_CALL = "reward = model(**inputs).logits[0, 0]"
_PROMPTED_CALL = """asked = tokenizer(prompt, truncation=True{special}, return_tensors="pt")
reward = model(
    **inputs, prompt_input_ids=asked["input_ids"], prompt_attention_mask=asked["attention_mask"]
).logits[0, 0]"""


class HeadParts(NamedTuple):
    """The head of a reward model, as `plm.backbones.modeling_reward.RewardHead` reads it."""

    options: dict[str, Any]
    """Arguments of ``RewardConfig``."""
    tensors: dict[str, Tensor]
    """State of the head."""


def reward_backbone(spec: Mapping[str, Any] | None) -> HFBackbone:
    """The backbone of a checkpoint, for a model that holds it.

    Raises:
        ValueError: If it is no Hugging Face model.
    """
    backbone = Backbone.from_spec(spec) if spec else None
    if type(backbone) is not HFBackbone:  # what derives from it reads other features off the model
        name = "none" if backbone is None else type(backbone).__name__
        raise ValueError(
            f"a reward model holds its backbone: expected features of a Hugging Face model, got {name}; fit on a "
            "plm.backbones.HFBackbone"
        )
    return backbone


def reward_model(backbone: HFBackbone, head: HeadParts) -> RewardModel:
    """Backbone and head as one model, in evaluation mode on the CPU."""
    from transformers import AutoModel

    from plm.backbones.modeling_reward import RewardConfig, RewardModel

    base = backbone.read(AutoModel.from_pretrained, dtype=getattr(torch, backbone.dtype))
    steps_over = backbone.actual_kind == "sequence_classification" and backbone.head_pad_id >= 0
    described = {name: value for name, value in base.config.to_dict().items() if name != "_name_or_path"}
    config = RewardConfig(
        base=described,
        pooling=backbone.actual_pooling,
        layer=-1 if backbone.reads_last_layer else backbone.layer_number,
        normalize=backbone.normalize,
        skip_token_id=backbone.head_pad_id if steps_over else None,
        pad_token_id=backbone.pad_id,
        dtype=backbone.dtype,
        **head.options,
    )
    with torch.device("meta"):  # the weights are there already
        model = RewardModel(config)
    model.model = base
    model.head.load_state_dict(head.tensors, assign=True)
    model.train(False).requires_grad_(False)
    return model


def save_linear_reward(direction: Tensor, backbone: HFBackbone, folder: Path) -> None:
    """Write a reward that is linear in the features of a backbone, as a model of transformers where one reads the same.

    Args:
        direction: ``(D,)`` what features are multiplied by.
        backbone: Gives the features.
        folder: New or empty.
    """
    direction = direction.detach().float().cpu()
    model = _own_classifier(direction, backbone)
    if model is None:
        nothing = torch.zeros_like(direction)
        options = {"head": "dot", "width": len(direction)}
        one = torch.ones(())
        tensors = {"feature_scale": one, "mean": nothing, "prompt_mean": nothing, "factor": one, "direction": direction}
        tensors |= {"scale": one, "point": nothing, "size": one, "weights": nothing[:0]}
        model = reward_model(backbone, HeadParts(options, {name: value.clone() for name, value in tensors.items()}))
    save_reward_model(model, backbone, folder)


def _own_classifier(direction: Tensor, backbone: HFBackbone) -> PreTrainedModel | None:
    """The model of transformers that has a linear map at the last token, where that is what the backbone reads."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    if backbone.actual_pooling != "last" or not backbone.reads_last_layer or backbone.normalize:
        return None
    steps_over = backbone.head_pad_id if backbone.actual_kind == "sequence_classification" else backbone.pad_id
    read = backbone.tokenizer(backbone.render("a", "b"), add_special_tokens=backbone.template != "chat")["input_ids"]
    if backbone.tokenizer.pad_token_id != steps_over or read[-1] == steps_over:
        return None
    base = backbone.read(AutoModel.from_pretrained, dtype=getattr(torch, backbone.dtype))
    config = deepcopy(base.config)
    config.num_labels = 1
    config.pad_token_id = config.get_text_config().pad_token_id = steps_over
    try:
        with torch.device("meta"):  # the weights are there already
            model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    except ValueError:  # there is none for this network
        return None
    head, inner = getattr(model, "score", None), getattr(model, model.base_model_prefix, None)
    if not isinstance(head, torch.nn.Linear) or head.bias is not None or type(inner) is not type(base):
        return None
    setattr(model, model.base_model_prefix, base)
    head.weight = torch.nn.Parameter(direction[None].to(base.dtype))
    return model.eval()


def save_reward_model(model: PreTrainedModel, backbone: HFBackbone, folder: Path) -> None:
    """Write a reward model with its tokenizer, a README on how texts are put together, and the code it may need."""
    model.save_pretrained(folder)
    tokenizer = backbone.tokenizer
    tokenizer.model_max_length = backbone.max_tokens
    tokenizer.init_kwargs |= {"truncation_side": "left", "padding_side": "right"}
    tokenizer.save_pretrained(folder)
    special = ", add_special_tokens=False" if backbone.template == "chat" else ""
    has_code = model.config.model_type == "plm_reward"
    call = _PROMPTED_CALL.format(special=special) if has_code and model.config.num_prototypes else _CALL
    code, trust = (_OWN_CODE, ", trust_remote_code=True") if has_code else (_NO_CODE, "")
    text = _README.format(text=_TEXT[backbone.template], special=special, call=call, code=code, trust=trust)
    write_text(folder / "README.md", text)
