"""A text classifier of Hugging Face: one score for each class.

Axes: N texts, B texts of one batch, T tokens, C classes.
"""

from __future__ import annotations

from functools import cached_property
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from plm.backbones.backbone import Key, chat_messages, device, plain_text
from plm.backbones.huggingface import HFBackbone


class Classifier(HFBackbone):
    """A sequence-classification model, whose features are its logits.

    Args:
        model: Folder of a model, or its id on the Hugging Face hub.
        template: ``response`` leaves the prompt out, ``plain`` joins both as they stand, ``chat`` renders them with the
            tokenizer's chat template.
    """

    def __init__(self, model: str, template: Literal["chat", "plain", "response"] = "response") -> None:
        super().__init__(model, kind="sequence_classification", template=template)

    @property
    def feature_dim(self) -> int:
        """Number of classes C; 1 for a reward model."""
        return int(self._config.num_labels)

    @property
    def reference_head(self) -> None:
        """Logits have no head of their own."""
        return None

    def key(self) -> Key:
        """Identity of the cache."""
        return {**super().key(), "pooling": "logits"}

    def class_row(self, label: str | int | None) -> int:
        """Row of a class, by name or number; None is the only one of a reward model.

        Raises:
            ValueError: If there is no such class, or several and none is named.
        """
        names = {int(row): str(name) for row, name in self._config.id2label.items()}
        if label is None and len(names) == 1:
            return 0
        rows = [row for row, name in names.items() if label in (row, name)]
        if not rows:
            raise ValueError(f"expected a class of {self.model!r}, one of {list(names.values())}, got {label!r}")
        return rows[0]

    def render(self, prompt: str, response: str) -> str:
        """The text that is classified."""
        if self.template == "plain":
            return (prompt if chat_messages(prompt) is None else plain_text(prompt, "")) + response
        return super().render(prompt, response)

    def _load(self) -> None:
        import transformers

        load = transformers.AutoModelForSequenceClassification.from_pretrained
        model, info = self.read(load, dtype=getattr(torch, self.dtype), output_loading_info=True)
        if info["missing_keys"]:
            absent = sorted(info["missing_keys"])[:3]
            raise ValueError(f"expected a trained classifier, but {self.model!r} lacks the weights {absent}")
        self._network = model.eval().requires_grad_(False).to(device())
        self._network.config.use_cache = False
        if self._pads is False:
            self.batch_tokens = 1  # the head finds the last token by the padding: one text at a time

    @cached_property
    def _pads(self) -> bool:
        """Whether the model knows padding."""
        return self._config.get_text_config().pad_token_id is not None

    @torch.inference_mode()
    def _forward(self, rows: list[list[int]]) -> Tensor:
        """Logits ``(B, C)`` float32 of B rows of token ids."""
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.full(mask.shape, self._config.get_text_config().pad_token_id if self._pads else 0)
        ids[mask] = torch.tensor(list(chain.from_iterable(rows)))
        device = self._network.device
        logits: Tensor = self._network(input_ids=ids.to(device), attention_mask=mask.long().to(device)).logits
        return logits.float()
