"""VPL on a live backbone: encoder and decoder read a language model that is trained along.

Deviations: published, contexts are read with the frozen language model and targets with one that LoRA adapts; here one
    network reads both, so that what it learns of targets is known of contexts, too. The feature of a text is its last
    hidden state, without a linear map after it.

Axes: N pairs of several users, D feature width.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from plm.method.episodes import Arranged, arrange
from plm.method.live import LiveMethod
from plm.methods.vpl import VPL
from plm.types import PreferenceBatch


class LiveVPL(LiveMethod, VPL):
    """`VPL` whose features are hidden states of a backbone that is trained along, as far as ``train_backbone`` says.

    An episode is made of the pairs of a user in one batch: set ``data.pairs_per_user``, and ``data.batch_size`` to
    several times as much. See `LiveMethod` and `VPL` for the arguments.
    """

    search_space: ClassVar[dict[str, list[Any]]] = {}  # that of VPL is made for cached features

    def param_groups(self) -> list[dict[str, Any]]:
        """The backbone at ``backbone_lr``, all else at ``lr``."""
        backbone = self.backbone_parameters()
        in_backbone = {id(parameter) for parameter in backbone}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in in_backbone]
        groups: list[dict[str, Any]] = [{"params": rest, "lr": self.lr}]
        return [*groups, {"params": backbone, "lr": self.backbone_lr}] if backbone else groups

    def on_train_start(self) -> None:
        """Check that there are episodes.

        Raises:
            ValueError: If no user has several pairs in a batch.
        """
        batches = self.trainer.train_dataloader or []
        if not any(batch.num_pairs > len(batch.user_index.unique()) for batch in batches):
            raise ValueError(
                "LiveVPL learns from several pairs of a user in one batch, got none; set data.pairs_per_user, such as "
                "16, and data.batch_size to several times as much"
            )
        super().on_train_start()

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Return the loss of `VPL` on the present features."""
        return super().loss(self._read_batch(batch))

    def _arranged(self, batch: PreferenceBatch) -> Arranged:
        """`arrange` a batch; equal texts have equal features, because each is read once."""
        return arrange(batch, self.target_rule == "response")
