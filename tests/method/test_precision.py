"""Trained weights that a model brings in half precision move as those of a float32 run do."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from plm.backbones import CausalLM
from plm.method.network import NetworkMethod
from plm.methods.clap import CLaP
from plm.methods.lora_dpo import LoRADPO
from plm.methods.pal.live import LivePAL
from plm.methods.sft import SFT
from plm.testing import quiet_trainer
from tests.method.test_accumulation import Loader, batch_of

METHODS: dict[str, Callable[..., NetworkMethod]] = {
    "sft": SFT,
    "dpo": lambda **options: LoRADPO(adapter="full", **options),
    "clap": lambda **options: CLaP(unfreeze=True, latent_dim=4, encoder_layers=1, deterministic=True, **options),
    "live": lambda **options: LivePAL(train_backbone="full", backbone_lr=1e-4, **options),
}


@pytest.mark.parametrize(("case", "precision"), [("sft", "32-true"), *((case, "bf16-mixed") for case in METHODS)])
def test_trained_weights_are_kept_in_float32(
    case: str, precision: Any, causal_lm: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(causal_lm("gpt2"), tmp_path / "rounded")  # its weights are the same in either precision
    AutoModelForCausalLM.from_pretrained(str(folder)).bfloat16().float().save_pretrained(folder)
    networks = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        spec = CausalLM(str(folder), dtype=dtype).spec()  # type: ignore[arg-type]
        options = {} if case == "live" else {"warmup": 0.0}
        method = METHODS[case](num_users=2, feature_dim=16, backbone=spec, lr=1e-4, **options)
        method.configure_model()
        before = [value.detach().clone() for value in method.policy.network.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = quiet_trainer(tmp_path, max_epochs=1, precision=precision)
            trainer.fit(method, train_dataloaders=Loader([batch_of(method, [0, 1, 2, 3])] * 2))
        networks.append(list(method.policy.network.parameters()))
        moved = sum(int((value != old).sum()) for value, old in zip(networks[-1], before, strict=True))
        assert moved > 0.3 * sum(value.numel() for value in before)  # many rows of embeddings are of no text
    for one, two in zip(*networks, strict=True):
        assert two.dtype == torch.float32
        torch.testing.assert_close(two, one, atol=1e-7, rtol=1e-5)


def test_a_cached_reference_that_is_not_the_policys_is_refused(causal_lm: Callable[[str], Path]) -> None:
    for dtype, options, message in (
        ("bfloat16", {}, r"reference_logps: expected false with model\.adapter 'full' .*'bfloat16'"),
        ("float32", {"ref_model_sync_steps": 2}, r"reference_logps: expected false with model\.ref_model_sync_steps"),
    ):
        spec = CausalLM(str(causal_lm("gpt2")), dtype=dtype).spec()
        method = LoRADPO(num_users=2, feature_dim=16, backbone=spec, adapter="full", **options)
        method.trainer = SimpleNamespace(  # type: ignore[assignment]
            datamodule=SimpleNamespace(view="tokens", user_ids=["a", "b"], reference_head=None, reference_logps=True),
            precision="32-true",
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            accumulate_grad_batches=1,
        )
        with pytest.raises(ValueError, match=message):
            method.setup("fit")
