"""Adam by rows: whoever is in a step with a row, the row moves as a parameter of its own would."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from plm.optimizer import RowAdam, adam_rows, clip_norms, clip_rows, row_gradient


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("together", [False, True], ids=["ragged", "together"])
def test_rows_move_as_parameters_of_their_own_would(together: bool) -> None:
    """Random presence, clipping, weight decay, warm-up: absent rows keep every bit, moments and steps included."""
    table = draw(5, 3, 2)
    warmup = torch.full((5,), 4.0) if together else torch.tensor([4.0, 1.0, 8.0, 0.0, 2.0])
    peers = [torch.nn.Parameter(row.clone()) for row in table]
    optimizers = [torch.optim.AdamW([peer], lr=0.1, betas=(0.9, 0.95), weight_decay=0.2) for peer in peers]
    ours = RowAdam(
        [{"params": [table], "weight_decay": 0.2}],
        lr=0.1,
        betas=(0.9, 0.95),
        row_rate=lambda rows, taken: ((taken + 1) / warmup[rows].clamp_min(1)).clamp_max(1),
    )
    taken = [0] * 5
    for turn in range(12):
        rows = torch.tensor([row for row in range(5) if together or (turn + row) % (row + 1) == 0 or turn == 5])
        slope = draw(5, 3, 2, seed=turn) * 0.4
        before = copy.deepcopy((table, ours.state_dict()["state"]))
        table.grad = row_gradient(table, rows, slope[rows])
        clip_rows(table, 0.7)
        ours.step()
        for row in range(5):
            if row not in rows:
                assert torch.equal(table[row], before[0][row])
                old = before[1].get(0, {})
                assert all(torch.equal(ours.state[table][name][row], old[name][row]) for name in old)
                continue
            taken[row] += 1
            peers[row].grad = slope[row].clone()
            torch.nn.utils.clip_grad_norm_([peers[row]], 0.7)
            optimizers[row].param_groups[0]["lr"] = 0.1 * min(taken[row] / max(float(warmup[row]), 1.0), 1.0)
            optimizers[row].step()
            torch.testing.assert_close(table[row], peers[row].data, rtol=1e-6, atol=1e-6)
    assert ours.state[table]["step"].tolist() == taken and together == (len(set(taken)) == 1)


def test_several_tensors_of_a_user_are_one_problem() -> None:
    """Of users with the same and with different learning rates, against a parameter and an optimizer of each tensor."""
    shapes = [(3, 4, 2), (3, 2)]
    for rate in (torch.full((3,), 0.1), torch.tensor([0.1, 0.05, 0.2])):
        values = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
        means, squares = ([torch.zeros_like(value) for value in values] for _ in "ab")
        peers = [[torch.nn.Parameter(value[user].clone()) for value in values] for user in range(3)]
        optimizers = [
            torch.optim.AdamW(own, lr=float(lr), betas=(0.9, 0.95), weight_decay=0.2)
            for own, lr in zip(peers, rate, strict=True)
        ]
        for turn in range(6):
            slopes = [draw(*shape, seed=10 * turn + place) for place, shape in enumerate(shapes)]
            for user, own in enumerate(peers):
                for parameter, slope in zip(own, slopes, strict=True):
                    parameter.grad = slope[user].clone()
                torch.nn.utils.clip_grad_norm_(own, 1.5)
                optimizers[user].step()
            clip_norms(slopes, 1.5)
            adam_rows(values, slopes, means, squares, torch.full((3,), float(turn)), rate, (0.9, 0.95), 0.2)
        for user, own in enumerate(peers):
            for value, parameter in zip(values, own, strict=True):
                torch.testing.assert_close(value[user], parameter.data, rtol=1e-6, atol=1e-6)


def test_a_step_without_rows_moves_nothing_and_a_dense_one_is_that_of_torch() -> None:
    table, dense = draw(3, 2), torch.nn.Parameter(draw(3, 2, seed=1))
    peer = torch.nn.Parameter(dense.detach().clone())
    ours = RowAdam([{"params": [table, dense], "weight_decay": 0.1}], lr=0.05)
    theirs = torch.optim.AdamW([peer], lr=0.05, weight_decay=0.1)
    kept = table.clone()
    for turn in range(5):
        table.grad = row_gradient(table, torch.zeros(0, dtype=torch.long), torch.zeros(0, 2))
        dense.grad = draw(3, 2, seed=turn)
        peer.grad = dense.grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(table, kept) and ours.state[table]["step"].tolist() == [0, 0, 0]
    torch.testing.assert_close(dense, peer, rtol=1e-6, atol=1e-6)
