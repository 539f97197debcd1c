"""Every method is fitted, tested, adapted and asked for scores and texts on a device that is not the CPU.

The numbers are those of the CPU: what the device changes is where tensors lie, and it refuses what a GPU refuses.
`test_pretend_device.py` runs these cases; by hand: pytest tests/device/cases.py.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from plm.backbones import HashingBackbone
from plm.checkpoint import load_method
from plm.data.schema import make_pairs
from plm.explaining import explain
from plm.generation import sample
from plm.method import PersonalizationMethod
from plm.method.abilities import Writer
from plm.methods.lore import PublishedLoRe
from plm.testing import MethodContract, saved
from plm.testing.contract import quiet_trainer
from plm.types import Context, Tokens
from tests.device.pretend_device import NAME, PretendTensor, counted_waits, pretend_device, pretend_trainer_options


@pytest.fixture(autouse=True)
def there() -> Iterator[torch.device]:
    with pretend_device() as device:
        yield device


def contracts() -> list[type[MethodContract]]:
    """Every contract of every method, with all modes that they have."""
    found: list[type[MethodContract]] = []
    for name in os.environ.get("PLM_DEVICE_CONTRACTS", "contract latent_dpo live_methods token_methods").split():
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"contract/test_{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, MethodContract) and value.__module__ == name
            if not inspect.isabstract(value)
        ]
    return found


def to(context: Context, device: torch.device) -> Context:
    moved: list[Any] = [None if value is None else value.to(device) for value in context]
    return Context(*moved)


class Deed(L.Callback):
    """A test as the command line runs it, and the margins of its batches."""

    def __init__(self) -> None:
        self.margins: list[torch.Tensor] = []

    def on_test_batch_end(self, trainer: Any, module: Any, outputs: Any, *rest: Any, **more: Any) -> None:
        self.margins.append(outputs["margin"].cpu())


def fit_and_test(contract: MethodContract, options: dict[str, Any]) -> tuple[PersonalizationMethod, torch.Tensor]:
    """A method after two epochs, and its margins on the test, on the device of the options."""
    data = contract.data()
    torch.manual_seed(0)
    method = contract.make(data.num_users, data.feature_dim)
    deed = Deed()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(folder, max_epochs=2, callbacks=[deed], **options)
        trainer.fit(method, datamodule=data)
        trainer.test(method, datamodule=data, verbose=False)
    return method, torch.cat(deed.margins)


@pytest.mark.parametrize("contract", contracts(), ids=lambda contract: contract.__name__)
def test_a_method_does_there_what_it_does_on_the_cpu(contract: type[MethodContract], there: torch.device) -> None:
    here = contract()
    expected, expected_margins = fit_and_test(here, {})
    method, margins = fit_and_test(here, pretend_trainer_options() | {"accelerator": "auto"})
    method.to(there)
    assert all(isinstance(value.data, PretendTensor) for value in method.parameters())
    assert torch.allclose(margins, expected_margins, atol=1e-4, rtol=1e-3)
    context = here.context()
    adapted, reference = method.eval().adapt(to(context, there)), expected.eval().adapt(context)
    for name, value in reference.tensors.items():
        assert adapted.tensors[name].device == there
        assert torch.allclose(adapted.tensors[name].cpu(), value, atol=1e-4, rtol=1e-3), name
    chosen = context.chosen
    responses = chosen.take(context.mask) if isinstance(chosen, Tokens) else chosen[context.mask]
    if not method.reads_prompts:
        rows = context.mask.nonzero()[:, 0]
        with torch.no_grad():
            scores = method.score(responses.to(there), adapted, rows=rows.to(there))
            assert torch.allclose(scores.cpu(), expected.score(responses, reference, rows=rows), atol=1e-4, rtol=1e-3)
    if isinstance(method, Writer) and method.can_write:
        prompts, users = ["hello", "why not"], torch.tensor([0, 1])
        texts = sample(method, prompts, adapted.take(users.to(there)), max_new_tokens=4)
        assert texts == sample(expected, prompts, reference.take(users), max_new_tokens=4)


def test_what_users_differ_in_is_the_same_there(there: torch.device) -> None:
    rows = [
        {"user_id": f"u{user}", "prompt": "", "chosen": chosen, "rejected": rejected}
        for user in range(10)
        for chosen, rejected in (("red wine", "beer"), ("tea", "cold milk"), ("cocoa", "water with ice"))
    ]
    torch.manual_seed(0)
    method = PublishedLoRe(10, 16, num_bases=3, backbone=HashingBackbone(16).spec()).eval()
    method.user_ids = [f"u{user}" for user in range(10)]
    method.num_pairs.fill_(3)
    with saved(method) as path:
        here, found = (explain(load_method(path).to(place), make_pairs(rows, "rows")) for place in ("cpu", there))
    assert found.spread == pytest.approx(here.spread, rel=1e-4) and found.users_differ
    assert [one.contrasts[0].liked for one in found.directions] == [one.contrasts[0].liked for one in here.directions]


# ---------------------------------------------------------------------- the device itself
def test_devices_do_not_mix(there: torch.device) -> None:
    far, near = torch.arange(6.0, device=there).view(2, 3), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="same device"):
        far + near
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([far, near])
    with pytest.raises(RuntimeError, match="indices should be"):
        near[torch.tensor([0], device=there)]
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, generator=torch.Generator(), device=there)
    with torch.device(NAME), pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, generator=torch.Generator())
    with pytest.raises(TypeError, match="numpy"):
        far.numpy()
    with pytest.raises(RuntimeError, match="same device"):
        torch.stack([far.sum(), torch.tensor(2.0)])
    assert far[torch.tensor([1])].tolist() == [[3.0, 4.0, 5.0]]  # indices may come from the CPU
    assert (far * torch.tensor(2.0)).sum().item() == 30.0  # and numbers
    assert torch.equal((far.cpu() + near).to(there).cpu(), torch.arange(6.0).view(2, 3) + 1)


def test_waits_of_the_host_are_counted(there: torch.device) -> None:
    far = torch.arange(4.0, device=there)
    with counted_waits() as waits:
        far + 1
        assert not waits
        far.sum().item(), far[far > 1], far.cpu(), far.tolist()
    assert sum(waits.values()) == 4


def test_what_is_trained_there_is_what_is_trained_here(there: torch.device) -> None:
    weights = []
    for device in (torch.device("cpu"), there):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2).to(device)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(4, 3, device=device)).square().sum().backward()
            optimizer.step()
        weights.append(layer.weight.detach().cpu())
    assert torch.equal(*weights)
