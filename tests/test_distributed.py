"""Sums and gradients of two processes, against torch on one."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from plm.distributed import average_gradients, clip_gradients, is_first, pair_weights, summed, world_size

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")
TOUCHED = [[0, 3, 3], [3, 1]]  # rows of a table that the pairs of either process touch


def gradients(rank: int) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """A table whose gradient has few rows, and a parameter like others."""
    table, other = torch.nn.Parameter(torch.zeros(5, 2)), torch.nn.Parameter(torch.zeros(3))
    rows = torch.nn.functional.embedding(torch.tensor(TOUCHED[rank]), table, sparse=True)
    ((rows * (rank + 1)).sum() + (other * torch.arange(3) * (rank + 1)).sum()).backward()  # type: ignore[no-untyped-call]
    return table, other


def clipped(limit: float, algorithm: str, whole: torch.Tensor, sharded: torch.Tensor) -> list[torch.Tensor]:
    """Gradients that ``clip_gradients`` has bounded, one of them of a parameter shared out over the processes."""
    mesh = init_device_mesh("cpu", (2,))
    parameters = [torch.nn.Parameter(whole), torch.nn.Parameter(distribute_tensor(sharded, mesh, [Shard(0)]))]
    parameters[0].grad = whole.clone()
    parameters[1].grad = distribute_tensor(sharded, mesh, [Shard(0)])
    clip_gradients(parameters, limit, algorithm)
    return [parameters[0].grad, parameters[1].grad.full_tensor()]  # type: ignore[attr-defined]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    table, other = gradients(rank)
    average_gradients([table, other, torch.nn.Parameter(torch.zeros(1))])
    assert table.grad is not None and table.grad.is_sparse
    weights = pair_weights(torch.tensor([1.0, 2.0]) if rank else torch.tensor([1.0, 2.0, 3.0, 4.0]))
    whole, sharded = torch.tensor([3.0, -4.0]), torch.tensor([[1.0], [-12.0], [5.0]])
    found: dict[str, Any] = {
        "rows": table.grad.coalesce().indices()[0],
        "table": table.grad.to_dense(),
        "other": other.grad,
        "sum": summed(torch.tensor([rank + 1.0])),
        "weights": weights,
        "about": (world_size(), is_first()),
        "norm": clipped(2.0, "norm", whole, sharded),
        "loose": clipped(100.0, "norm", whole, sharded),
        "value": clipped(2.0, "value", whole, sharded),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    # by hand: row 0 is touched once by the first, 3 twice by the first and once, at twice the size, by the second
    expected = torch.tensor([[0.5, 0.5], [1.0, 1.0], [0.0, 0.0], [2.0, 2.0], [0.0, 0.0]])
    for found in (one, two):
        assert torch.equal(found["table"], expected) and found["rows"].tolist() == [0, 1, 3]
        assert torch.equal(found["other"], 1.5 * torch.arange(3))
        assert found["sum"].item() == 3
    assert one["about"] == (2, True) and two["about"] == (2, False)
    # six pairs in all: of loader's factors 4 * 2 / 6 and 2 * 2 / 6, nothing is left
    torch.testing.assert_close(one["weights"], torch.tensor([1.0, 2.0, 3.0, 4.0]) * 6 / 8)
    torch.testing.assert_close(two["weights"], torch.tensor([1.0, 2.0]) * 6 / 4)
    whole, sharded = torch.tensor([3.0, -4.0]), torch.tensor([[1.0], [-12.0], [5.0]])
    norm = (9 + 16 + 1 + 144 + 25) ** 0.5
    for found in (one, two):
        for gradient, given in zip(found["norm"], (whole, sharded), strict=True):
            torch.testing.assert_close(gradient, given * 2.0 / norm)
        for gradient, given in zip(found["loose"], (whole, sharded), strict=True):
            assert torch.equal(gradient, given)
        assert torch.equal(found["value"][0], torch.tensor([2.0, -2.0]))
        assert torch.equal(found["value"][1], torch.tensor([[1.0], [-2.0], [2.0]]))


def test_one_process_needs_nobody() -> None:
    table, other = gradients(0)
    before = table.grad, other.grad
    average_gradients([table, other])
    assert (table.grad, other.grad) == before and (world_size(), is_first()) == (1, True)
    values = torch.ones(2, requires_grad=True)
    assert not summed(values).requires_grad and torch.equal(summed(values), values)
    assert pair_weights(values) is values
