"""PAL-B from a checkpoint: texts with prompts, adapted users, scores and queries see what the datamodule saw."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plm.backbones import HashingBackbone
from plm.checkpoint import load_method
from plm.cli import main
from plm.data.collate import EvalBatches
from plm.data.datamodule import PreferenceDataModule
from plm.data.sources.pairs import PairFiles
from plm.data.sources.synthetic import SyntheticPairs
from plm.functional import win_probability
from plm.methods.pal import PAL
from plm.querying import posterior_samples, sampled_chances
from plm.testing import assert_same, quiet_trainer, saved
from plm.types import PreferenceBatch
from plm.users import UserStore, store_path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreferenceDataModule:
    """Conflicting groups; every third prompt is a chat."""
    folder = tmp_path_factory.mktemp("data")
    table = SyntheticPairs("conflicting_groups", num_users=16, pairs_per_user=16, num_objectives=1, noise=0.0).load()
    with (folder / "pairs.jsonl").open("w") as file:
        for row in range(table.num_pairs):
            prompt: Any = table.prompts[table.prompt[row]]
            if table.prompt[row] % 3 == 0:
                prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
            sides = {
                name: table.responses[table.items[getattr(table, name)[row], 1]] for name in ("chosen", "rejected")
            }
            file.write(json.dumps({"user_id": table.user_ids[table.user[row]], "prompt": prompt, **sides}) + "\n")
    return PreferenceDataModule(
        PairFiles(str(folder / "pairs.jsonl")),
        HashingBackbone(dim=24),
        cache_dir=str(folder / "cache"),
        prompt_features=True,
        shots=[],
    )


@pytest.fixture(scope="module")
def method(data: PreferenceDataModule, tmp_path_factory: pytest.TempPathFactory) -> PAL:
    torch.manual_seed(0)
    made = PAL(
        data.num_users,
        data.feature_dim,
        backbone=data.backbone_spec,
        num_prototypes=2,
        variant="B",
        head="angle",
        projector="mlp0-linear-dropout0-nobias",
        user_projector="mlp1-gelu-dropout0",
        groups={"projector": {"lr": 0.05}, "user_projectors": {"lr": 0.05}},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(tmp_path_factory.mktemp("fit"), max_epochs=20, check_val_every_n_epoch=20)
        trainer.fit(made, datamodule=data)
    made.trainer = None  # type: ignore[assignment]
    return made.eval()


@pytest.fixture
def checkpoint(method: PAL) -> Iterator[Path]:
    with saved(method) as path:
        yield path


def batch_with_texts(data: PreferenceDataModule, name: str) -> tuple[PreferenceBatch, list[dict[str, str]]]:
    """The only test batch of seen or unseen users, and user, prompt, chosen and rejected of each of its rows."""
    table, loader = data.table, data.test_dataloader()[data.eval_names("test").index(name)]
    assert isinstance(loader, EvalBatches)
    (batch,) = loader
    assert batch.user_row is not None
    owner = table.user[loader.rows]
    rows = [loader.rows[owner == user] for user in batch.user_row.unique_consecutive().tolist()]
    texts = table.texts()
    found = [
        {
            "user_id": table.user_ids[table.user[row]],
            "prompt": texts[table.chosen[row]][0],
            "chosen": texts[table.chosen[row]][1],
            "rejected": texts[table.rejected[row]][1],
        }
        for row in np.concatenate(rows)
    ]
    return batch, found


def column(rows: list[dict[str, str]], name: str) -> list[str]:
    return [row[name] for row in rows]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ["seen", "unseen"])
def test_texts_with_prompts_give_the_margins_of_the_batches_bit_for_bit(
    data: PreferenceDataModule, method: PAL, checkpoint: Path, name: str
) -> None:
    loaded = load_method(checkpoint)
    batch, rows = batch_with_texts(data, name)
    assert loaded.reads_prompts and any(prompt.startswith("[{") for prompt in column(rows, "prompt"))
    assert loaded.encode is not None and loaded.encode_prompts is not None and batch.prompt is not None
    prompts = column(rows, "prompt")
    chosen, rejected = (loaded.encode(prompts, column(rows, side)) for side in ("chosen", "rejected"))
    from_texts = batch._replace(chosen=chosen, rejected=rejected, prompt=loaded.encode_prompts(prompts))
    for mine, theirs in zip(from_texts[:2] + from_texts[5:6], batch[:2] + batch[5:6], strict=True):
        assert torch.equal(mine, theirs)  # type: ignore[arg-type]
    with torch.no_grad():
        users = method.batch_states(batch)
        margin = method.margin(batch)
        assert torch.equal(loaded.margin(from_texts), margin)
        sides = [loaded.score(column(rows, side), users, prompts=prompts) for side in ("chosen", "rejected")]
        expected = [method.score(side, users, prompt_features=batch.prompt) for side in (batch.chosen, batch.rejected)]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(sides, expected, strict=True))
        assert torch.equal(sides[0] - sides[1], margin)
        others = loaded.score(column(rows, "chosen"), users, prompts=prompts[::-1])
    assert not torch.equal(others, sides[0])  # prompts decide
    if name == "seen":
        assert torch.equal(
            loaded.score(column(rows, "chosen"), user_id=column(rows, "user_id"), prompts=prompts), sides[0]
        )
    assert loaded.score([], prompts=[]).shape == (0,)


def test_adapt_score_and_query_read_prompts(
    data: PreferenceDataModule, method: PAL, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands on files against the datamodule's contexts and features."""
    batch, rows = batch_with_texts(data, "unseen")
    assert batch.context is not None and batch.context_row is not None and batch.prompt is not None
    table, texts = data.table, data.table.texts()
    (support,) = np.nonzero((data.splits.user_split[table.user] == 1) & (data.splits.stage == 0))
    pairs = [
        {
            "user_id": table.user_ids[table.user[row]],
            "prompt": texts[table.chosen[row]][0],
            "chosen": texts[table.chosen[row]][1],
            "rejected": texts[table.rejected[row]][1],
        }
        for row in support
    ]
    ckpt = ["--ckpt_path", str(checkpoint)]
    assert main(["adapt", *ckpt, "--pairs", write(tmp_path / "pairs.jsonl", pairs)]) == 0
    state, known = UserStore(store_path(checkpoint)).get(column(rows, "user_id"))
    assert known.all()
    expected = method.adapt(batch.context).take(batch.context_row)
    assert_same(state, expected, 1e-5)  # users share a padded batch in another order

    asked = [{"response": row["chosen"], "prompt": row["prompt"], "user_id": row["user_id"]} for row in rows]
    reference = [{"response": row["rejected"], "prompt": row["prompt"]} for row in rows]
    capsys.readouterr()
    files = [
        "--responses",
        write(tmp_path / "in.jsonl", asked),
        "--reference",
        write(tmp_path / "ref.jsonl", reference),
    ]
    assert main(["score", *ckpt, *files]) == 0
    scored = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with torch.no_grad():
        own = method.score(batch.chosen, state, prompt_features=batch.prompt)
        assert [row["reward"] for row in scored] == pytest.approx(own.tolist(), abs=1e-5)
        for index in (0, len(rows) - 1):
            same = state.take(torch.full((len(rows),), index))
            other = method.score(batch.rejected, same, prompt_features=batch.prompt)
            wins = float(win_probability(own[index : index + 1], other))
            assert scored[index]["win_probability"] == pytest.approx(wins, abs=1e-5)

    pool = write(tmp_path / "pool.jsonl", rows[:12])
    assert main(["query", *ckpt, "--user", rows[0]["user_id"], "--pool", pool, "--num_pairs", "3"]) == 0
    chosen = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert isinstance(batch.chosen, Tensor) and isinstance(batch.rejected, Tensor) and isinstance(batch.prompt, Tensor)
    samples = posterior_samples(state.take(torch.tensor([0])), 256)
    sides = batch.chosen[:12], batch.rejected[:12]
    chances = sampled_chances(method, *sides, samples, batch.prompt[:12]).mean(0)
    found = {(row["prompt"], row["chosen"], row["rejected"]): row["chance"] for row in chosen}
    for row, chance in zip(rows[:12], chances.tolist(), strict=True):
        key = row["prompt"], row["chosen"], row["rejected"]
        assert key not in found or found[key] == pytest.approx(chance, abs=1e-5)


def test_features_without_prompts_are_refused(method: PAL, data: PreferenceDataModule) -> None:
    batch, _ = batch_with_texts(data, "seen")
    users = method.batch_states(batch)
    with pytest.raises(ValueError, match=r"trained with prompts: expected prompt_features .* got none"):
        method.score(batch.chosen, users)
    assert batch.prompt is not None
    with pytest.raises(ValueError, match=r"got shape \(1, 24\)"):
        method.score(batch.chosen, users, prompt_features=batch.prompt[:1])
    context = batch_with_texts(data, "unseen")[0].context
    assert context is not None
    with pytest.raises(ValueError, match="trained with prompts"):
        method.adapt(context._replace(prompt=None))
