"""What users differ in, on planted users: who leans where, clusters, and the texts that tell."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import plm
from plm.backbones import HashingBackbone
from plm.checkpoint import load_method
from plm.cli import main
from plm.data.schema import PairTable, make_pairs
from plm.explaining import explain, explanation, scorers
from plm.explaining.axes import principal_axes
from plm.explaining.explanation import Explanation
from plm.explaining.report import lines, page
from plm.explaining.rewards import SharedRewards, explainable
from plm.method import PersonalizationMethod
from plm.methods.bradley_terry import BradleyTerry
from plm.methods.lora_dpo import LoRADPO
from plm.methods.lore import LoRe, PublishedLoRe
from plm.methods.pal import PAL
from plm.testing import saved

WORDS = [f"word{number}" for number in range(30)]
FAST = {
    "trainer.max_epochs": 20,
    "trainer.check_val_every_n_epoch": 10,
    "trainer.enable_progress_bar": False,
    "data.shots": [],
    "data.unseen_users": 0.0,
}
NUM_USERS, NUM_LONG = 40, 28
SHORT, LONG = 5, 12
"""Texts have fewer words than the one, or at least as many as the other."""


def pairs(has_taste: bool = True) -> list[dict[str, Any]]:
    """Users of whom 28 in 40, in no order, like long texts and the others short ones; or who choose at random."""
    draw, rows = random.Random(0), []
    likes_long = draw.sample([True] * NUM_LONG + [False] * (NUM_USERS - NUM_LONG), NUM_USERS)
    for user in range(NUM_USERS):
        for number in range(14):
            long, short = (
                " ".join(draw.choices(WORDS, k=draw.randrange(low, high))) for low, high in ((LONG, 18), (2, SHORT))
            )
            is_long = likes_long[user] if has_taste and draw.random() < 0.95 else draw.random() < 0.5
            chosen, rejected = (long, short) if is_long else (short, long)
            rows.append(
                {"user_id": f"reader-{user:02}", "prompt": f"q{number}", "chosen": chosen, "rejected": rejected}
            )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("explained")


def fitted(root: Path, method: str, has_taste: bool = True, **options: Any) -> plm.Run:
    settings = {**FAST, "data.cache_dir": str(root / "cache")}
    return plm.fit(pairs(has_taste), method, backbone="hashing", folder=root, options=settings, **options)


@pytest.fixture(scope="module")
def lore(root: Path) -> plm.Run:
    return fitted(root, "LoRe", num_bases=4)


def is_long(text: str) -> bool:
    return len(text.split()) >= LONG


def sides(explanation: Explanation, number: int) -> set[tuple[bool, bool]]:
    """Whether the liked and the other text of each contrast of a direction are long."""
    return {(is_long(pair.liked), is_long(pair.other)) for pair in explanation.directions[number].contrasts}


def test_two_planted_groups_stand_at_the_ends_of_an_axis(lore: plm.Run) -> None:
    found = explain(lore.method, make_pairs(pairs(), "rows"))
    axis = found.directions[0]
    assert found.users_differ and found.num_users == NUM_USERS and found.num_comparisons == NUM_USERS * 14
    assert axis.name == "axis 1" and axis.share > 0.9 and axis.sides == (NUM_LONG, NUM_USERS - NUM_LONG)
    assert sides(found, 0) == {(True, False)} and len(axis.contrasts) == 5 and axis.length > 0.8
    for pair in axis.contrasts:
        assert pair.here > 0 > pair.opposite and pair.here - pair.population > 1
        assert pair.here + pair.opposite == pytest.approx(2 * pair.population)
    assert [group.num_users for group in found.clusters] == [NUM_LONG, NUM_USERS - NUM_LONG]
    assert found.clusters[0].centre[0] > 0 > found.clusters[1].centre[0]
    evidence = found.evidence
    assert evidence.difference_low > 0.1 and evidence.own > 0.9 > 0.8 > evidence.other and not evidence.held_out
    assert evidence.num_pairs == NUM_USERS * 14


def test_margins_on_the_page_are_those_of_users(lore: plm.Run) -> None:
    """A user one spread towards + has the margin of the page, by the method's own scores."""
    method, found = lore.method, explain(lore.method, make_pairs(pairs(), "rows"))
    assert isinstance(method, LoRe)
    pair = found.directions[0].contrasts[0]
    plain = [float(value) for value in method.score([pair.liked, pair.other])]
    assert pair.population == pytest.approx(plain[0] - plain[1], abs=1e-4)
    margins = np.array(
        [np.subtract(*method.score([pair.liked, pair.other], user_id=user).tolist()) for user in method.users.ids]
    )
    spread = np.sqrt(np.square(margins - pair.population).mean())  # one axis is nearly all that users differ in
    assert pair.here - pair.population == pytest.approx(spread, rel=0.05)


def test_nothing_depends_on_the_coordinates_of_the_bases(lore: plm.Run) -> None:
    """Bases beside the population's turned, stretched and flipped, and weights that make up for it."""
    table = make_pairs(pairs(), "rows")
    before = explain(lore.method, table)
    method = load_method(lore.checkpoint)
    assert isinstance(method, LoRe)
    torch.manual_seed(0)
    turn = torch.eye(4)
    turn[:, 1:] = torch.randn(4, 3)  # the first basis stays the population's reward
    ids = method.users.ids
    state, _ = method.known_users.lookup(ids)
    moved = state.tensors["weights"] - method.population_state(1).tensors["weights"]
    with torch.no_grad():
        method.bases.copy_(method.bases @ turn)
        weights = method.population_state(len(ids)).tensors["weights"] + moved @ torch.linalg.inv(turn).T
    with saved(method) as path:
        turned = load_method(path)
        turned.users.add(ids, state._replace(tensors={**state.tensors, "weights": weights}))
        after = explain(turned, table)
    assert [pair.liked for pair in after.directions[0].contrasts] == [
        pair.liked for pair in before.directions[0].contrasts
    ]
    for name in ("share", "largest", "sides", "length"):
        assert getattr(after.directions[0], name) == pytest.approx(getattr(before.directions[0], name), abs=1e-3)
    assert [group.num_users for group in after.clusters] == [group.num_users for group in before.clusters]
    assert after.spread == pytest.approx(before.spread, rel=1e-3)


def test_prototypes_of_planted_groups_are_their_largest(root: Path) -> None:
    found = explain(fitted(root, "PAL", num_prototypes=3).method, make_pairs(pairs(), "rows"))
    assert found.word == "prototype" and [one.name for one in found.directions] == [f"prototype {k}" for k in range(3)]
    assert sum(one.share for one in found.directions) == pytest.approx(1.0, abs=1e-5)
    leaning = {number: one.leaning for number, one in enumerate(found.directions) if one.leaning}
    longer = [number for number in leaning if found.directions[number].length > 0]
    assert sum(leaning[number] for number in longer) == NUM_LONG and sum(leaning.values()) == NUM_USERS
    assert sum(one.largest for one in found.directions) == NUM_USERS
    for number in leaning:
        assert sides(found, number) == {(number in longer, number not in longer)}
    assert all(one.sides is None and one.most >= one.share for one in found.directions)
    assert [group.num_users for group in found.clusters] == [NUM_LONG, NUM_USERS - NUM_LONG]
    assert "How much of each prototype users have" in page(found)


def test_users_who_do_not_differ_have_neither_axes_nor_clusters(root: Path) -> None:
    run = fitted(root, "LoRe", has_taste=False, num_bases=3)
    found = explain(run.method, make_pairs(pairs(has_taste=False), "rows"))
    assert not found.users_differ and not found.clusters and not found.directions
    assert lines(found)[0].endswith("users do not differ")
    assert "no clusters are claimed: users do not differ" in lines(found)[2]


# ---------------------------------------------------------------------- without a fit
TEXTS = {"red wine": "beer", "tea": "cold milk", "water with ice": "cocoa", "orange juice": "cider"}


def small(num_users: int = 20) -> PublishedLoRe:
    """Three bases, of which users have two."""
    backbone = HashingBackbone(dim=16)
    method = PublishedLoRe(num_users, 16, num_bases=3, backbone=backbone.spec()).eval()
    method.user_ids = [f"user-{row:02}" for row in range(num_users)]
    with torch.no_grad():
        weights = torch.tensor([[0.7, 0.3, 0.0]] * (num_users - 8) + [[0.2, 0.8, 0.0]] * 8)
        method.weight_logits.copy_(weights.clamp_min(1e-9).log())
        method.mean_weights.copy_(weights.mean(0))
        method.num_pairs.fill_(3)
        method.num_pairs[-1] = 0
    return method


def small_table(user: str = "somebody") -> PairTable:
    rows = [{"user_id": user, "prompt": "", "chosen": one, "rejected": other} for one, other in TEXTS.items()]
    return make_pairs(rows, "rows")


def explained(method: PersonalizationMethod, table: PairTable) -> Explanation:
    with saved(method) as path:
        return explain(load_method(path), table)


def test_weights_of_users_by_hand() -> None:
    found = explained(small(), small_table())
    assert found.num_users == 19 and found.num_without == 1
    first, second, third = found.directions
    assert (first.largest, second.largest, third.largest) == (12, 7, 0)
    assert first.share == pytest.approx((12 * 0.7 + 7 * 0.2) / 19) and first.most == pytest.approx(0.7)
    assert first.centre == pytest.approx(0.5) and second.most == pytest.approx(0.8)
    assert not third.contrasts and third.note == "hardly any user has it: no texts"


def test_a_basis_is_a_user_who_is_all_of_it() -> None:
    """And its texts are in the order of how far its margin is from the population's."""
    method, table = small(), small_table()
    found = explained(method, table)
    features = HashingBackbone(dim=16).encode([text for pair in TEXTS.items() for text in pair])
    with torch.no_grad():
        rewards = features @ method._bases()  # (8, 3)
        margins = (rewards[::2] - rewards[1::2]).double()
        population = margins @ method.mean_weights.double()
    beyond = margins[:, 0] - population
    order = beyond.abs().argsort(descending=True).tolist()
    shown = found.directions[0].contrasts
    for pair, row in zip(shown, order, strict=True):
        texts = list(TEXTS.items())[row]
        assert (pair.liked, pair.other) == (texts if beyond[row] > 0 else texts[::-1])
        sign = 1 if beyond[row] > 0 else -1
        assert pair.here == pytest.approx(sign * float(margins[row, 0]), abs=1e-5)
        assert pair.population == pytest.approx(sign * float(population[row]), abs=1e-5)


def test_no_clusters_are_claimed_where_nothing_shows_that_weights_mean_anything() -> None:
    """Not of users whose pairs are not there, are few, or are predicted as well by another user's weights."""
    strangers = explained(small(), small_table())
    assert not strangers.clusters and "no pairs of known users" in strangers.clusters_say
    assert "no pair of the data is a known user's" in lines(strangers)[1]
    one = explained(small(), small_table("user-03"))
    assert not one.clusters and "pairs of 8 known users are needed" in one.clusters_say
    draw, texts = random.Random(0), list(TEXTS.items())
    rows = []
    for user in range(20):
        for number in range(6):
            chosen, rejected = draw.sample(texts[number % 4], 2)
            rows.append({"user_id": f"user-{user:02}", "prompt": f"{number}", "chosen": chosen, "rejected": rejected})
    random_choices = explained(small(), make_pairs(rows, "rows"))
    assert not random_choices.clusters and "beyond chance" in random_choices.clusters_say


def test_held_out_pairs_alone_are_evidence() -> None:
    rows = [row for user in range(12) for row in _rows_of(f"user-{user:02}")]
    table = make_pairs(rows, "rows")
    held_out = np.arange(table.num_pairs) % 4 == 0
    with saved(small()) as path:
        found = explain(load_method(path), table, held_out)
    assert found.evidence.held_out and found.evidence.num_pairs == 12 and found.num_comparisons == 4
    assert "no user was learned from these" in lines(found)[1]


def _rows_of(user: str) -> list[dict[str, Any]]:
    return [{"user_id": user, "prompt": "", "chosen": one, "rejected": other} for one, other in TEXTS.items()]


def test_other_methods_are_refused() -> None:
    method = BradleyTerry(2, 16, backbone=HashingBackbone(dim=16).spec())
    with pytest.raises(ValueError, match=r"users of BradleyTerry are no weights of a few rewards .* LoRe, PAL, PReF"):
        explain(method, small_table())
    spec = {"class_path": "plm.backbones.CausalLM", "init_args": {"model": "/nowhere"}}
    with pytest.raises(ValueError, match="users of LoRADPO as it is set are no weights"):
        explain(LoRADPO(num_users=1, feature_dim=16, backbone=spec), small_table())


def test_a_checkpoint_without_users_says_what_to_do() -> None:
    method = small()
    with saved(method) as path:
        path.with_suffix(".users.db").unlink()
        with pytest.raises(ValueError, match="got none; run plm adapt, or give --users"):
            explain(load_method(path), small_table())


def test_bases_as_scorers() -> None:
    """Of shares each basis by itself; of coordinates users to both sides, around the population."""
    prompts, texts = [""] * 8, [text for pair in TEXTS.items() for text in pair]
    method = small()
    with saved(method) as path:
        found = scorers(load_method(path), prompts, texts, np.arange(0, 8, 2), np.arange(1, 8, 2))
    with torch.no_grad():
        expected = (HashingBackbone(dim=16).encode(texts) @ method._bases()).double().numpy()
    assert list(found) == ["basis 0", "basis 1", "basis 2"]
    np.testing.assert_allclose(np.stack(list(found.values()), 1), expected, atol=1e-5)


def test_axes_as_scorers(lore: plm.Run) -> None:
    prompts, texts = ["", ""], [" ".join(WORDS[:14]), " ".join(WORDS[3:6])]
    found = scorers(lore.method, prompts, texts, np.array([0]), np.array([1]))
    assert list(found) == ["axis 1 +", "axis 1 −"]
    plus, minus = found.values()
    population = lore.method.score(texts).double().numpy()
    np.testing.assert_allclose((plus + minus) / 2, population, atol=1e-5)
    assert plus[0] > plus[1] and minus[0] < minus[1]


@pytest.mark.parametrize("head", ["dot", "dist_squared", "dist", "angle"])
def test_prototypes_are_shown_where_margins_are_linear_in_their_weights(head: Any) -> None:
    """Else a user's margins are not the weights' mean of those of the prototypes."""
    linear = head in ("dot", "dist_squared")
    method = PAL(2, 8, num_prototypes=3, head=head)
    assert method.has_weights == linear and PAL(2, 8, num_prototypes=3, head=head, partition=True).has_weights
    if not linear:
        with pytest.raises(ValueError, match="users of PAL as it is set are no weights of a few rewards"):
            explainable(method)


def test_who_is_the_population_leans_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five users at the population and three who have more of the second prototype."""
    moved = np.zeros((8, 2))
    moved[:3] = [-0.3, 0.3]
    found = SharedRewards(np.zeros(2), np.eye(2), np.eye(2), principal_axes(np.eye(2), moved), 1.0, 1.0)
    reader = explanation._Reader(None, None, found, np.ones(2))  # type: ignore[arg-type]
    monkeypatch.setattr(explanation._Reader, "_contrasts", lambda *_, **__: [])
    bases, axes = reader.bases("prototype", moved + 0.5, moved), reader.axes()
    assert [one.leaning for one in bases] == [0, 3] and [one.largest for one in axes] == [3]


# ---------------------------------------------------------------------- the command
def test_the_command_writes_a_page_and_the_same_again(
    lore: plm.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pairs()
    evil = "<script>alert(1)</script> " + " ".join(WORDS)
    rows.append({"user_id": "reader-00", "prompt": "<b>bold</b>", "chosen": evil, "rejected": "word1"})
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    written = []
    for name in ("one", "two"):
        folder = tmp_path / name
        command = ["explain", "--ckpt_path", str(lore.checkpoint), "--pairs", str(file), "--output", str(folder)]
        assert main(command) == 0
        written.append([(folder / f"explain.{kind}").read_bytes() for kind in ("html", "json")])
    assert written[0] == written[1]
    html, found = written[0][0].decode(), json.loads(written[0][1])
    assert "2 clusters" in capsys.readouterr().out
    assert found["directions"][0]["sides"] == [NUM_LONG, NUM_USERS - NUM_LONG]
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html and "&lt;b&gt;bold" in html
    assert f">{file.name}:561<" in html and "reader-" not in html and "reader-" not in json.dumps(found)
    texts = {row[side] for row in rows for side in ("chosen", "rejected")}
    assert {pair[side] for pair in found["directions"][0]["contrasts"] for side in ("liked", "other")} <= texts


def test_a_recipe_tells_which_pairs_are_held_out(
    lore: plm.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", pairs())
    Path("recipe.yaml").write_text(
        "data:\n  source: {class_path: plm.data.sources.pairs.PairFiles, init_args: {path: pairs.jsonl}}\n"
        "  unseen_users: 0.0\n"
    )
    assert main(["explain", "--ckpt_path", str(lore.checkpoint), "--config", "recipe.yaml", "--output", "out"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"right on \S+ % of 160 pairs of 40 known users", shown) and "no user was learned" in shown
    run = shutil.copytree(lore.checkpoint.parent.parent, tmp_path / "run")  # others read the run, too
    checkpoint = run / lore.checkpoint.relative_to(lore.checkpoint.parent.parent)
    for other in (["--data.split_seed", "7"], []):  # another split than the fit's; then a user who was learned anew
        if not other:
            write_rows(tmp_path / "new.jsonl", [row for row in pairs() if row["user_id"] == "reader-00"])
            assert main(["adapt", "--ckpt_path", str(checkpoint), "--pairs", "new.jsonl"]) == 0
        command = ["explain", "--ckpt_path", str(checkpoint), "--config", "recipe.yaml", "--output", "out"]
        assert main([*command, *other]) == 0
        shown = capsys.readouterr().out
        assert ("no user was learned" in shown) == (not other) and ("too good, if users were" in shown) == bool(other)
    assert "of 39 known users" in shown
    command = ["explain", "--ckpt_path", str(lore.checkpoint)]
    assert main(command) == 2 and "give either --config or --pairs" in capsys.readouterr().err
    assert main([*command, "--config", "recipe.yaml", "--layout", "pairs"]) == 2
    assert "--layout goes with --pairs" in capsys.readouterr().err
