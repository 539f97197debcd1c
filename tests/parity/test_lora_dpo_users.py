"""Many users' adapters at once: trained by the Trainer on the data module as each would be alone, and adapted so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plm.backbones import CausalLM, Policy
from plm.data.collate import build_context
from plm.data.datamodule import PreferenceDataModule
from plm.data.schema import PairTable, pair_table
from plm.data.sources import PairSource
from plm.methods.lora_dpo import LoRADPO
from plm.methods.lora_dpo.adapters import grouped
from plm.optimizer import RowAdam, clip_rows, rate_factor
from plm.testing.contract import quiet_trainer
from plm.types import PreferenceBatch
from tests.marks import slow_but

Folder = Callable[[str], Path]
PAIRS_OF = {"anna": 7, "ben": 4, "cleo": 1, "dora": 6, "emil": 7}
"""Some have fewer steps than others, some a last step of fewer pairs."""
STEPS = {"pairs_per_user": 2, "batch_size": 6}
"""Three users in a batch: the five are trained in two groups, one after the other."""


class People(PairSource):
    """So many random pairs of each user, which depend on the user alone."""

    name = "people"

    def __init__(self, users: Sequence[str]) -> None:
        self.users = list(users)

    def load(self) -> PairTable:
        prompts: list[str] = []
        responses: list[str] = []
        owner: list[int] = []
        for row, user in enumerate(self.users):
            random = np.random.default_rng(sum(map(ord, user)))
            for _ in range(PAIRS_OF[user]):
                words = ["".join(random.choice(list("abcdefgh "), size)) for size in random.integers(2, 9, 3)]
                prompts.append(f"{user} {words[0]}")
                responses += [f" {words[1]}.", f" {words[2]}!"]
                owner.append(row)
        count = np.arange(len(owner))
        return pair_table(
            self.users,
            prompts,
            responses,
            user=np.array(owner),
            prompt=count,
            chosen=2 * count,
            rejected=2 * count + 1,
        )


def data(folder: Path, users: Sequence[str], cache: Path, **options: Any) -> PreferenceDataModule:
    parts = {"unseen_users": 0.0, "val_rows": 0.0, "test_rows": 0.0, "reference_logps": True}
    return PreferenceDataModule(People(users), CausalLM(str(folder)), str(cache), **{**parts, **STEPS, **options})


def fit(folder: Path, users: Sequence[str], out: Path, make: type[LoRADPO] = LoRADPO, **options: Any) -> LoRADPO:
    """Three epochs with all that a recipe may ask for: clipping, decay, warm-up and a schedule."""
    trainer_options = options.pop("trainer", {"max_epochs": 3, "gradient_clip_val": 0.05})
    module = data(folder, users, out, **options.pop("data", {}))
    common = {
        "rank": 2,
        "alpha": 4.0,
        "lr": 1e-2,
        "beta": 0.3,
        "weight_decay": 0.1,
        "warmup": 0.3,
        "schedule": "cosine",
    }
    method = make(
        num_users=len(users), feature_dim=16, backbone=module.backbone_spec, **{"mode": "per_user", **common, **options}
    )
    quiet_trainer(out, **trainer_options).fit(method, datamodule=module)
    return method


def with_shared(shared: Tensor) -> type[LoRADPO]:
    """The method with a shared adapter that stays as it is."""

    class Held(LoRADPO):
        def build(self, policy: Policy) -> None:
            super().build(policy)
            if self.mode == "shared_and_user":
                self.shared.requires_grad_(False)
                self.shared.data.copy_(shared)

    return Held


@pytest.mark.filterwarnings("ignore:.*eval mode")
@pytest.mark.parametrize("kind", slow_but(["gpt2", "llama"], "llama"))
@pytest.mark.parametrize("share_prompts", [True, False])
def test_users_trained_together_equal_separate_runs(
    causal_lm: Folder, kind: str, share_prompts: bool, tmp_path: Path
) -> None:
    """Against the mode of one shared adapter, with torch's own AdamW, schedule and clipping, one user at a time."""
    folder, users = causal_lm(kind), list(PAIRS_OF)
    together = fit(folder, users, tmp_path, share_prompts=share_prompts)
    assert (together.adapters - together.fresh).detach().abs().amax(1).min() > 1e-2, "every user must have learned"
    for row, user in enumerate(users):
        alone = fit(folder, [user], tmp_path, mode="shared", share_prompts=share_prompts)
        assert (alone.shared[0] - together.adapters[row]).detach().abs().max() <= 1e-5


@pytest.mark.filterwarnings("ignore:.*eval mode")
def test_an_adapter_for_each_user_beside_a_shared_one(causal_lm: Folder, tmp_path: Path) -> None:
    """Both move; with the shared one held still, each user's is that of a separate run."""
    folder, users = causal_lm("gpt2"), list(PAIRS_OF)
    both = fit(folder, users, tmp_path, mode="shared_and_user")
    assert min((part - both.fresh).detach().abs().max() for part in (both.shared, *both.adapters)) > 1e-2
    held = with_shared(both.shared.detach())
    together = fit(folder, users, tmp_path, held, mode="shared_and_user")
    for row, user in enumerate(users):
        alone = fit(folder, [user], tmp_path, held, mode="shared_and_user")
        assert torch.equal(alone.shared, both.shared)
        assert (alone.adapters[0] - together.adapters[row]).detach().abs().max() <= 1e-5


@pytest.mark.filterwarnings("ignore:.*eval mode")
@pytest.mark.parametrize("mode", ["per_user", "shared_and_user"])
def test_unseen_users_are_adapted_as_each_would_be_trained_alone(causal_lm: Folder, mode: str, tmp_path: Path) -> None:
    """Full-batch steps at a constant rate; in chunks of users that fit; a user without pairs is as the population."""
    folder, users = causal_lm("llama"), list(PAIRS_OF)
    seen = fit(folder, users[:2], tmp_path, mode=mode, adapt_steps=4, adapt_lr=3e-3)
    module = data(folder, users, tmp_path)
    module.setup("fit")
    support = np.flatnonzero(module.table.user != users.index("ben"))
    context = build_context(module._data, support, np.arange(len(users)))
    whole = seen.adapt(context)
    assert whole.num_pairs.tolist() == [7, 0, 1, 6, 7]
    seen.batch_tokens = 300  # a user or two at a time
    assert torch.allclose(seen.adapt(context).tensors["adapter"], whole.tensors["adapter"], atol=1e-5)
    make = LoRADPO if mode == "per_user" else with_shared(seen.shared.detach())
    for row, user in enumerate(users):
        if user == "ben":
            assert torch.equal(whole.tensors["adapter"][row], seen.population)
            continue
        one_step = {"data": {"pairs_per_user": 8, "batch_size": 8}, "trainer": {"max_epochs": 4}}
        alone = fit(folder, [user], tmp_path, make, mode=mode, lr=3e-3, warmup=0.0, schedule="constant", **one_step)
        assert (alone.adapters[0] - whole.tensors["adapter"][row]).detach().abs().max() <= 1e-5


@pytest.mark.filterwarnings("ignore:.*eval mode")
@pytest.mark.parametrize("reference_logps", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_first_step_costs_log_two(causal_lm: Folder, precision: str, reference_logps: bool, tmp_path: Path) -> None:
    """Policy and reference are the same to begin with, read in one precision; a cache in another is refused."""
    options = {"data": {"reference_logps": reference_logps}, "beta": 10.0}
    seen: list[Tensor] = []

    class First(LoRADPO):
        def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
            out = super().loss(batch)
            seen.append(out["loss"].detach() / len(torch.unique(batch.user_index)))
            return out

    def run() -> None:
        trainer = {"max_steps": 1, "precision": precision}
        fit(causal_lm("gpt2"), list(PAIRS_OF), tmp_path, First, trainer=trainer, **options)

    if reference_logps and precision == "bf16-mixed":
        with pytest.raises(ValueError, match=r"data.reference_logps: expected false with trainer.precision 'bf16-mix"):
            run()
        return
    run()
    # a cache was read in other batches; beta of 10 shows a hundred times what the usual one would
    assert seen[0].item() == pytest.approx(np.log(2), abs=1e-4 if reference_logps else 1e-6)


def test_groups_of_texts_are_as_few_as_can_be() -> None:
    cases = {(0, 0, 1, 1): [0, 1], (2, 2, 2): [2], (3, 3, 3, 3, 1, 1): [3, 3, 1], (0, 0, 1): [0, 0, 1], (): []}
    for rows, owners in cases.items():
        assert grouped(torch.tensor(rows, dtype=torch.long)).tolist() == owners


# ---------------------------------------------------------------------- the optimizer
def test_rows_move_as_torch_adamw_moves_parameters_of_their_own() -> None:
    """Rows absent from a step stand still, and a schedule counts the steps of each row."""
    torch.manual_seed(0)
    start, totals = torch.randn(4, 3, 2), torch.tensor([6.0, 3.0, 6.0, 2.0])
    table = torch.nn.Parameter(start.clone())
    ours = RowAdam(
        [{"params": [table], "weight_decay": 0.2}],
        lr=0.1,
        row_rate=lambda rows, taken: rate_factor("cosine", 0.4, taken, totals[rows]),
    )
    rows = [torch.nn.Parameter(row.clone()) for row in start]
    theirs = [torch.optim.AdamW([row], lr=0.1, weight_decay=0.2) for row in rows]

    def factor(row: int) -> Callable[[int], float]:
        rising = int(0.4 * totals[row])
        return lambda step: (
            step / rising
            if step < rising
            else 0.5 * (1 + np.cos(np.pi * min(1.0, (step - rising) / (float(totals[row]) - rising))))
        )

    schedules = [torch.optim.lr_scheduler.LambdaLR(one, factor(row)) for row, one in enumerate(theirs)]
    for present in ([0, 1, 2, 3], [0, 2], [1, 0], [2], [0, 1, 2, 3], [2, 0], [0, 2]):
        gradient = torch.randn(len(present), 3, 2)
        table.grad = torch.sparse_coo_tensor(torch.tensor([present]), gradient, start.shape)
        clip_rows(table, 0.7)
        ours.step()
        for row, value in zip(present, gradient, strict=True):
            rows[row].grad = value.clone()
            torch.nn.utils.clip_grad_norm_([rows[row]], 0.7)
            theirs[row].step()
            schedules[row].step()
    for row, value in enumerate(rows):
        torch.testing.assert_close(table[row], value, rtol=1e-5, atol=1e-5)


def test_values_are_clipped_too_and_dense_gradients_as_one() -> None:
    table, whole = (torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(2))
    table.grad = torch.sparse_coo_tensor(torch.tensor([[2, 2]]), torch.tensor([[3.0, 0.0], [1.0, -9.0]]), (3, 2))
    clip_rows(table, 2.0, "value")
    assert table.grad.to_dense().tolist() == [[0, 0], [0, 0], [2, -2]]
    whole.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    clip_rows(whole, 1.0)
    torch.testing.assert_close(whole.grad, torch.tensor([[0.6, 0.0], [0.0, 0.8], [0.0, 0.0]]))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_transformers(schedule: Any) -> None:
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=10)
    expected = []
    for _ in range(13):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    found = rate_factor(schedule, 0.3, torch.arange(13), torch.tensor(10))
    if schedule == "cosine":
        expected[10:] = [0.0] * 3  # theirs swings up again after the end
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)
