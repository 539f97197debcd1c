"""Token rows and training batches of tokens, on texts whose tokens are their letters."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable
from itertools import chain

import numpy as np
import pytest
import torch

from plm.backbones import TooLong
from plm.data.collate import EpochPlace, FeaturedPairs, build_context, pair_batch
from plm.data.encoding import token_rows
from plm.data.keys import content_keys
from plm.data.rows import TokenRows
from plm.data.schema import PairTable, pair_table
from plm.data.token_batches import TokenBatches
from plm.types import Tokens


class Letters:
    """Every normalised letter is a token; a prompt of more than five leaves no room, a response is cut after 100."""

    def cut_completion(self, prompt: str, response: str, /) -> tuple[tuple[list[int], list[int]], int]:
        if len(prompt) > 5:
            raise TooLong(prompt, "too long")
        before, after = (list(map(ord, unicodedata.normalize("NFKC", text))) for text in (prompt, response))
        return (before, after[:100]), max(0, len(after) - 100)


def planted(pairs_of: list[int], prompt: str = "p") -> PairTable:
    """Users with so many pairs each; the responses of pair n are n + 1 times a letter, and one letter."""
    count = sum(pairs_of)
    return pair_table(
        [f"user {row}" for row in range(len(pairs_of))],
        [prompt],
        [letter * (n + 1) for n in range(count) for letter in "ab"],
        user=np.repeat(np.arange(len(pairs_of)), pairs_of),
        prompt=np.zeros(count, dtype=np.int64),
        chosen=2 * np.arange(count),
        rejected=2 * np.arange(count) + 1,
    )


def loader(
    table: PairTable, *, rank: int = 0, world_size: int = 1, epoch: int = 0, batch_size: int = 4, per_user: int = 0
) -> TokenBatches:
    table, tokens = token_rows(table, Letters())
    data = FeaturedPairs(table, tokens, None, np.arange(table.num_users))
    weight = np.linspace(0.5, 1.5, table.num_pairs).astype(np.float32)
    return TokenBatches(
        data,
        np.arange(table.num_pairs),
        weight / weight.mean(),
        batch_size,
        per_user or None,
        seed=0,
        user_keys=content_keys(table).user,
        place=lambda: EpochPlace(rank, world_size, epoch),
    )


def pairs(batch: object) -> list[int]:
    """Which pairs a batch holds: the length of the chosen response minus one."""
    return (batch.chosen.completion_mask.sum(-1) - 1).tolist()  # type: ignore[attr-defined]


def test_rows_are_padded_on_the_right_and_marked() -> None:
    table = planted([3], "pq")
    tokens = token_rows(table, Letters())[1].gather(table.chosen[[0, 2]])
    assert tokens.input_ids.tolist() == [[112, 113, 97, 0, 0], [112, 113, 97, 97, 97]]
    assert tokens.attention_mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert tokens.completion_mask.tolist() == [[False, False, True, False, False], [False, False, True, True, True]]
    alone = token_rows(table, Letters())[1].prompts_alone().gather(np.array([0]))
    assert alone.input_ids.tolist() == [[112, 113]] and not alone.completion_mask.any()


def test_pairs_that_do_not_fit_are_left_out_and_counted() -> None:
    prompts, one = np.array([0, 1]), np.ones(2, np.int64)
    texts = (["u"], ["short", "too long"], ["a", "b"])
    table = pair_table(*texts, user=0 * one, prompt=prompts, chosen=0 * one, rejected=one)
    with pytest.warns(UserWarning, match="1 of 2 pairs are left out: their prompts leave no room"):
        kept, _ = token_rows(table, Letters())
    assert kept.num_pairs == 1 and kept.dropped["too_long"] == 1
    with pytest.raises(ValueError, match=r"got none .*max_prompt_length"), warnings.catch_warnings():
        token_rows(planted([2], "too long"), Letters())


def test_cut_responses_are_reported_and_pairs_without_a_difference_left_out() -> None:
    texts = ["x" * 100 + "a", "x" * 100 + "b", "y" * 101, "z", "\ufb01n", "fin"]
    both = np.array([0, 2, 4]), np.array([1, 3, 5])
    table = pair_table(
        ["u"], ["p"], texts, user=np.zeros(3, int), prompt=np.zeros(3, int), chosen=both[0], rejected=both[1]
    )
    with pytest.warns(UserWarning) as caught:
        kept, tokens = token_rows(table, Letters())
    told = [str(one.message) for one in caught]
    assert told[0].startswith("3 of 6 responses are cut off where the model can read no more (the first at")
    assert told[1].startswith("1 of 3 pairs are left out: their responses differ only where they are cut off")
    assert told[2].startswith("1 of 3 pairs are left out: their responses are the same tokens")
    assert kept.dropped == {"same_when_cut": 1, "same_tokens": 1}
    assert [len(tokens.responses[item]) for item in (kept.chosen[0], kept.rejected[0])] == [100, 1]


def test_reference_log_probabilities_travel_with_the_tokens() -> None:
    table, tokens = token_rows(planted([3]), Letters())
    tokens = TokenRows(tokens.prompts, tokens.responses, tokens.prompt, np.arange(6, dtype=np.float32))
    data = FeaturedPairs(table, tokens, None, np.zeros(1, np.int64))
    batch = pair_batch(data, np.array([2, 0]), np.ones(2, np.float32), evaluation=False)
    assert isinstance(batch.chosen, Tokens) and batch.chosen.ref_logps is not None
    assert batch.chosen.ref_logps.tolist() == table.chosen[[2, 0]].tolist()


def test_a_context_of_tokens_is_padded_like_one_of_features() -> None:
    table, tokens = token_rows(planted([1, 2]), Letters())
    context = build_context(FeaturedPairs(table, tokens, None, np.arange(2)), np.arange(3), np.array([1, 0]))
    assert isinstance(context.chosen, Tokens)
    assert context.mask.tolist() == [[True, True], [True, False]]
    assert (context.chosen.completion_mask.sum(-1)).tolist() == [[2, 3], [1, 0]]


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_holds_every_pair_once(world_size: int) -> None:
    table = planted([7, 6])
    ranks = [list(loader(table, rank=rank, world_size=world_size, batch_size=2)) for rank in range(world_size)]
    assert sorted(pair for batches in ranks for batch in batches for pair in pairs(batch)) == list(range(13))
    assert len({len(batches) for batches in ranks}) == 1, "every process takes the same number of steps"
    # processes take the steps of one process with as many times the batch size, and weigh as much together
    whole = list(loader(table, batch_size=2 * world_size))
    for step, batch in enumerate(whole):
        parts = [ranks[rank][step] for rank in range(world_size)]
        assert sorted(flat(map(pairs, parts))) == sorted(pairs(batch))
        mean = sum(float((part.weight * torch.tensor(pairs(part))).mean()) for part in parts) / world_size
        assert mean == pytest.approx(float((batch.weight * torch.tensor(pairs(batch))).mean()), rel=1e-5)


def test_texts_of_similar_length_come_together_in_another_order_every_epoch() -> None:
    table = planted([40])
    one, two = (list(map(pairs, loader(table, epoch=epoch))) for epoch in (0, 1))
    assert one != two and sorted(flat(one)) == sorted(flat(two))
    assert max(max(batch) - min(batch) for batch in one) == 3, "forty lengths in ten batches of four neighbours"
    assert [batch[0] for batch in one] != sorted(batch[0] for batch in one), "batches are in random order"


@pytest.mark.parametrize("per_user", [0, 2])
def test_an_epoch_goes_on_after_the_batches_that_are_left_out(per_user: int) -> None:
    table = planted([11, 3])
    whole = [pairs(batch) for batch in loader(table, per_user=per_user)]
    again = loader(table, per_user=per_user)
    iterator = iter(again)  # Lightning asks for it before it knows how far the fit has come
    again.skip(2)
    assert [pairs(batch) for batch in iterator] == whole[2:]
    assert [pairs(batch) for batch in again] == whole, "the next epoch is whole again"
    again.skip(len(whole))
    assert [pairs(batch) for batch in again] == whole, "after a whole epoch comes the next"


def test_by_user_a_batch_holds_as_many_pairs_of_everyone() -> None:
    table = planted([4, 4, 4, 4])
    batches = list(loader(table, batch_size=4, per_user=2))
    users = [batch.user_index.tolist() for batch in batches]
    assert sorted(users[:2]) == sorted(users[2:]) == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert sorted(flat(map(pairs, batches))) == list(range(16))


def test_groups_of_users_take_turns_in_another_order_every_epoch() -> None:
    table = planted([8, 8, 8, 8, 8, 2])
    first: set[tuple[int, ...]] = set()
    for epoch in range(6):
        batches = list(loader(table, batch_size=4, per_user=2, epoch=epoch))
        users = [sorted({pair // 8 for pair in pairs(batch)}) for batch in batches]
        assert sorted(flat(users[:3])) == [0, 1, 2, 3, 4, 5]  # nobody waits for another's last pair
        assert len(batches) == 12
        first.add(tuple(users[0]))
    assert len(first) > 1


def test_a_users_batches_do_not_depend_on_the_others() -> None:
    table = planted([5, 3, 2])
    together = [batch for epoch in (0, 1) for batch in loader(table, batch_size=6, per_user=2, epoch=epoch)]
    for user in range(3):
        rows = np.flatnonzero(table.user == user)
        alone = [batch for epoch in (0, 1) for batch in loader(table.take(rows), batch_size=6, per_user=2, epoch=epoch)]
        mine = [
            [pair for pair, who in zip(pairs(b), b.user_index.tolist(), strict=True) if who == user] for b in together
        ]
        assert [pairs(batch) for batch in alone] == [part for part in mine if part]


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_out_the_users_of_a_batch(world_size: int) -> None:
    """What they take together weighs what it weighs in one process, also where a user is left for fewer of them."""
    table = planted([7, 5, 5, 3, 1, 1])
    whole = list(loader(table, batch_size=2 * world_size, per_user=2))
    ranks = [
        list(loader(table, rank=rank, world_size=world_size, batch_size=2, per_user=2)) for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {len(whole)}
    num_repeated = 0
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert {pair for part in parts for pair in pairs(part)} == set(pairs(batch)) and all(map(pairs, parts))
        num_repeated += sum(len(pairs(part)) for part in parts) - len(pairs(batch))
        mean = sum(float((part.weight * torch.tensor(pairs(part))).mean()) for part in parts) / world_size
        assert mean == pytest.approx(float((batch.weight * torch.tensor(pairs(batch))).mean()), rel=1e-5)
        for user in set(batch.user_index.tolist()):  # all pairs of a user are in the same processes
            rows = [part.weight[part.user_index == user] for part in parts if (part.user_index == user).any()]
            assert all(len(row) == (batch.user_index == user).sum() for row in rows)
    assert num_repeated > 0, "the case that users run out is covered"


@pytest.mark.parametrize("per_user", [0, 2])
def test_more_processes_than_work_are_refused(per_user: int) -> None:
    with pytest.raises(ValueError, match="for each of 3 processes, got"):
        list(loader(planted([2]), world_size=3, per_user=per_user))


def test_batches_by_prompt_hold_all_pairs_of_their_prompts() -> None:
    """Seven prompts with one to seven pairs: every pair once an epoch, prompts never divided, processes in step."""
    owner = np.repeat(np.arange(7), np.arange(1, 8))
    count = len(owner)
    table = pair_table(
        ["one", "two"],
        [f"p{number}" for number in range(7)],
        [letter * (1 + n % 5) + str(n) for n in range(count) for letter in "ab"],
        user=np.arange(count) % 2,
        prompt=owner,
        chosen=2 * np.arange(count),
        rejected=2 * np.arange(count) + 1,
    )
    table, tokens = token_rows(table, Letters())
    data = FeaturedPairs(table, tokens, None, np.arange(2))

    def epoch(rank: int, world_size: int, number: int = 0) -> list[list[str]]:
        batches = TokenBatches(
            data,
            np.arange(count),
            np.ones(count, dtype=np.float32),
            16,
            None,
            seed=0,
            user_keys=content_keys(table).user,
            place=lambda: EpochPlace(rank, world_size, number),
            prompts_per_batch=2,
        )
        assert len(batches) == len(list(batches))
        return [["".join(map(chr, ids[:2].tolist())) for ids in batch.chosen.input_ids] for batch in batches]

    alone = epoch(0, 1)
    seen = [prompt for batch in alone for prompt in batch]
    assert sorted(seen) == sorted(f"p{number}" for number in owner)
    assert all(len(set(batch)) <= 2 for batch in alone) and len(alone) == 4
    assert sum(len(set(batch)) for batch in alone) == 7  # no prompt in two batches
    assert epoch(0, 1, 1) != alone == epoch(0, 1)
    shared = [epoch(rank, 2) for rank in range(2)]
    assert len(shared[0]) == len(shared[1]) == 2
    assert sorted(prompt for part in shared for batch in part for prompt in batch) == sorted(seen)


@pytest.mark.parametrize("per_user", [0, 2])
def test_users_are_whole_in_the_pass_over_all_pairs(per_user: int) -> None:
    """However training batches are made, every pair once over two processes, and no user in two batches."""
    table = planted([3, 1, 4, 2, 5])
    seen = []
    for rank in range(2):
        for batch in loader(table, rank=rank, world_size=2, per_user=per_user).whole_users():
            seen.append((set(batch.user_index.tolist()), pairs(batch)))
    assert sorted(chain(*(found for _, found in seen))) == list(range(15))
    assert sorted(chain(*(users for users, _ in seen))) == list(range(5))
