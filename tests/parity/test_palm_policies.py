"""Portfolios of policies that write, and their oracles, against merged weights, full softmaxes and recomputed means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from plm.backbones import CausalLM, Completion, completion_tokens, mixed_logits
from plm.data.rewards import Length, Style
from plm.data.sources.population import CandidatePool
from plm.functional import PairList, fit_simplex
from plm.generation import sample
from plm.methods.palm.oracle import PolicySet
from plm.methods.palm.search import certificate, upper_bound, upper_planes
from plm.methods.palm.selection import choose_portfolio
from plm.portfolio.features import RewardFeatures, reward_spec
from plm.portfolio.measured import MixedPolicies, TrainedPolicies
from plm.portfolio.policies import Decoding, PolicyPortfolio
from plm.portfolio.training import LoRADPOFit, train_adapters, weighted_pairs
from plm.testing import saved, tiny_causal_lm
from plm.types import Context, Tokens, UserState

PROMPTS = ["ab", "ba", "b"]
SHARES = torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.0, 1.0]])


def objectives() -> RewardFeatures:
    rewards = {"marks": reward_spec(Style("exclamations")), "words": reward_spec(Length())}
    return RewardFeatures(rewards, {"long": "words", "short": "-words"}, [0.0, -8.0], [8.0, 8.0])


def portfolio(decoding: Decoding, users: int = 0) -> PolicyPortfolio:
    backbone = CausalLM(tiny_causal_lm().model).spec()
    made = PolicyPortfolio(users, 2, backbone, objectives().spec(), decoding, rank=2, alpha=3.0)
    made.user_ids = [f"u{row}" for row in range(users)]
    made.configure_model()
    return made.eval()


def sharpened(made: PolicyPortfolio) -> PolicyPortfolio:
    """Its language model as sure of the next token as a trained one."""
    made.policy.network.transformer.ln_f.weight.data *= 30
    return made


def adapters(made: PolicyPortfolio, num: int = 2) -> Tensor:
    """Large random ones."""
    return 0.3 * torch.randn(num, made.shape.num_parameters, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tokens() -> Tokens:
    """Responses of 1, 4 and 3 tokens."""
    ids = [[300 % 290, 7, 9], [5, 60, 61, 62, 63], [8, 9, 100, 101]]
    return completion_tokens(
        [Completion(row[: 2 if n == 0 else 1], row[2 if n == 0 else 1 :]) for n, row in enumerate(ids)]
    )


def full_logps(made: PolicyPortfolio, tokens: Tokens) -> list[Tensor]:
    """Log-softmax ``(n, V)`` before each response token, text by text, from the network as it stands."""
    out = []
    for ids, attended, is_response in zip(tokens.input_ids, tokens.attention_mask, tokens.completion_mask, strict=True):
        with torch.no_grad():
            scores = made.policy.network(input_ids=ids[attended][None]).logits[0].log_softmax(-1)
        first = int((attended & ~is_response).sum())
        out.append(scores[first - 1 : int(attended.sum()) - 1])
    return out


def picked(scores: list[Tensor], tokens: Tokens) -> Tensor:
    rows = zip(scores, tokens.input_ids, tokens.completion_mask, strict=True)
    return torch.stack([one.gather(1, ids[mask][:, None]).sum() for one, ids, mask in rows])


# ---------------------------------------------------------------------- merged
def test_a_merged_member_is_the_network_with_the_mixture_of_weight_changes(tokens: Tokens) -> None:
    """``W + scale sum_k w_k B_k A_k``; A and B mixed apart would be another network."""
    made = portfolio("merged")
    both = adapters(made)
    made.extend(both, SHARES)
    found = made.member_logps(tokens, torch.zeros(3, dtype=torch.long))
    modules = dict(made.policy.network.named_modules())
    matrices, weights = made.shape.matrices(both), SHARES[0]
    whole, apart = [], []
    for index, place in enumerate(made.shape.places):
        a, b = matrices[2 * index], matrices[2 * index + 1]  # (2, r, in), (2, out, r)
        whole.append(1.5 * torch.einsum("k,kor,kri->oi", weights, b, a))
        apart.append(1.5 * torch.einsum("k,kor->or", weights, b) @ torch.einsum("k,kri->ri", weights, a))
        assert place.is_conv
    for changes, close in ((whole, True), (apart, False)):
        originals = [modules[place.name].weight.detach().clone() for place in made.shape.places]
        for place, change in zip(made.shape.places, changes, strict=True):
            modules[place.name].weight.data += change.T
        expected = picked(full_logps(made, tokens), tokens)
        assert torch.allclose(found, expected, atol=1e-4) is close
        for place, original in zip(made.shape.places, originals, strict=True):
            modules[place.name].weight.data = original


def test_a_vertex_of_a_merge_is_the_single_objective_policy(tokens: Tokens) -> None:
    merged, own = portfolio("merged"), portfolio("own")
    both = adapters(merged)
    merged.extend(both, SHARES)
    own.extend(both, torch.eye(2))
    row = torch.ones(3, dtype=torch.long)
    assert torch.allclose(merged.member_logps(tokens, row), own.member_logps(tokens, row * 0), atol=1e-5)
    with torch.no_grad():
        expected = own.logps(tokens, both[:1]).total
    assert torch.allclose(own.member_logps(tokens, row * 0), expected, atol=1e-6)


# ---------------------------------------------------------------------- mixtures of distributions
def test_a_mixture_of_optima_is_the_optimum_of_the_mixture() -> None:
    """``prod_k (ref exp(r_k / beta))^w_k`` is ``ref exp(w . r / beta)`` up to a constant: the weights sum to one."""
    rng = np.random.default_rng(0)
    reference, rewards, weights = rng.dirichlet(np.ones(9)), rng.normal(size=(3, 9)), rng.dirichlet(np.ones(3))
    optima = [torch.as_tensor(np.log(reference) + reward / 0.2)[None] for reward in rewards]
    mixed = mixed_logits(optima, torch.as_tensor(weights)[None]).softmax(-1)[0].numpy()
    expected = reference * np.exp(weights @ rewards / 0.2)
    assert mixed == pytest.approx(expected / expected.sum())


def test_a_mixed_member_multiplies_distributions_token_by_token(tokens: Tokens) -> None:
    made = portfolio("logits")
    both = adapters(made)
    made.extend(both, SHARES)
    parts = []
    for one in both:
        with made.shape.use(one[None]):
            parts.append(full_logps(made, tokens))
    mixed = [(0.3 * a + 0.7 * b).log_softmax(-1) for a, b in zip(*parts, strict=True)]
    found = made.member_logps(tokens, torch.zeros(3, dtype=torch.long))
    assert torch.allclose(found, picked(mixed, tokens), atol=1e-5)
    # and it writes what it says: the likeliest first token
    state = UserState({"member": torch.zeros(1, dtype=torch.long)}, torch.zeros(1, dtype=torch.long))
    (first,) = sample(made, ["ab"], state, max_new_tokens=1, temperature=0.0)[0]
    asked = completion_tokens([Completion(made.causal_lm.prompt_tokens("ab"), [1])])
    scores = []
    for one in both:
        with made.shape.use(one[None]):
            scores.append(full_logps(made, asked)[0][0])
    assert first.token_ids == (int((0.3 * scores[0] + 0.7 * scores[1]).argmax()),)


# ---------------------------------------------------------------------- measuring
def test_rewards_are_means_of_what_is_written_and_the_oracle_owns_up_to_its_error() -> None:
    made = portfolio("merged")
    oracle = MixedPolicies(made, adapters(made), PROMPTS, beta=0.01, num_samples=3, max_new_tokens=6, seed=4)
    weights = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    pool = oracle.solve(weights)
    assert oracle.num_calls == 3 and made.mixture.tolist() == weights[:3].tolist()  # a weight vector is solved once
    assert oracle.members_for(weights) == [0, 1, 2, 0]
    for row in range(3):
        state = UserState({"member": torch.full((3,), row)}, torch.zeros(3, dtype=torch.long))
        texts = [
            one.text for own in sample(made, PROMPTS, state, num_samples=3, max_new_tokens=6, seed=4) for one in own
        ]
        long = np.mean([min(len(text.split()) / 8, 1) for text in texts])
        assert pool.rewards[row] == pytest.approx([long, 1 - long])
    assert pool.costs[:3] == pytest.approx(0.01 * np.maximum(oracle.divergence, 0))
    values = weights[:3] @ pool.take([0, 1, 2]).net.T
    assert oracle.error == pytest.approx(max(values[row].max() - values[row, row] for row in range(3)))
    assert oracle.max_cost == pytest.approx(pool.costs.max()) and oracle.max_reward == 2


@pytest.mark.parametrize("decoding", ["merged", "logits"])
def test_divergence_is_the_kl_of_the_first_token(decoding: Decoding) -> None:
    """Exact for texts of one token; none for adapters that change nothing."""
    made = sharpened(portfolio(decoding))
    apart = torch.stack([made.shape.start(0), adapters(made)[1]])
    oracle = MixedPolicies(made, apart, ["ab"], num_samples=600, max_new_tokens=1)
    oracle.solve(np.array([[1.0, 0.0], [0.3, 0.7]]))
    asked = completion_tokens([Completion(made.causal_lm.prompt_tokens("ab"), [1])])
    reference = full_logps(made, asked)[0][0]
    shares = made.mixture[1]
    if decoding == "merged":
        with made.shape.use(*(made.shape.weighed(a, w)[None] for a, w in zip(made.adapters, shares, strict=True))):
            own = full_logps(made, asked)[0][0]
    else:
        with made.shape.use(made.adapters[1:]):
            own = (0.3 * reference + 0.7 * full_logps(made, asked)[0][0]).log_softmax(-1)
    exact, spread = (own.exp() * (own - reference)).sum(), (own.exp() * (own - reference).square()).sum().sqrt()
    assert oracle.divergence[0] == pytest.approx(0.0, abs=1e-6)
    assert oracle.divergence[1] == pytest.approx(float(exact), abs=4 * float(spread) / 600**0.5)
    assert exact > 0.1


def test_a_portfolio_of_trained_policies_is_chosen_without_another_call() -> None:
    made = portfolio("own", users=2)
    asked: list[np.ndarray] = []

    def train(weights: np.ndarray) -> Tensor:
        asked.append(weights)
        return adapters(made, len(weights))

    oracle = TrainedPolicies(made, train, PROMPTS, num_samples=2, max_new_tokens=4)
    oracle.solve(np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.4]]))
    chosen = choose_portfolio(oracle, oracle.solved, 2, rounds=0)
    assert len(asked) == 1 and len(asked[0]) == 3 and chosen.error == oracle.error
    assert chosen.certificate == pytest.approx(certificate(chosen.members, oracle.solved, oracle.error).regret)
    made.keep(oracle.members_for(chosen.members.weights))
    users = np.array([[0.9, 0.1], [0.2, 0.8]])
    made.install(chosen, torch.as_tensor(users).float())
    assert made.mixture.shape[0] == len(chosen.members.weights) == len(made.adapters)
    state = made.user_states(torch.arange(2)).tensors
    values = users @ chosen.members.net.T
    planes = upper_planes(oracle.solved.weights, oracle.solved.values(oracle.solved.weights).max(1) + oracle.error)
    assert state["member"].tolist() == values.argmax(1).tolist()
    assert state["regret"].numpy() == pytest.approx(upper_bound(users, planes) - values.max(1), abs=1e-5)


# ---------------------------------------------------------------------- users
@pytest.fixture
def served() -> Iterator[PolicyPortfolio]:
    """Two members, long and short, with known rewards."""
    made = portfolio("own", users=2)
    made.extend(adapters(made), torch.eye(2))
    pool = PolicySet(np.eye(2), np.array([[0.9, 0.1], [0.4, 0.8]]), np.zeros(2))
    made.install(choose_portfolio(TrainedPolicies(made, lambda w: made.adapters, PROMPTS), pool, 2, rounds=0))
    yield made


def test_users_are_inferred_from_the_objectives_of_their_pairs(served: PolicyPortfolio) -> None:
    """As from features; a user without pairs gets the member whose worst regret is smallest, here the second."""
    chosen, rejected = ["a b c d e", "a b c"], ["a", "a b c d"]
    backbone = served.causal_lm

    def read(texts: list[str]) -> Tokens:
        rows = backbone.represent(["ab", "b"], texts)
        return rows.map(lambda value: torch.stack([value, value]))  # (2, 2, T)

    mask = torch.tensor([[True, True], [False, False]])
    state = served.adapt(Context(read(chosen), read(rejected), mask, mask.float()))
    design = torch.tensor([[4 / 8, -4 / 8], [-1 / 8, 1 / 8]]) * 8.0
    pairs = PairList(design, torch.zeros(2), torch.ones(2), torch.ones(2), torch.zeros(2).long(), 1)
    expected = fit_simplex(pairs, torch.tensor([0.5, 0.5]), 0.1)
    assert torch.allclose(state.tensors["weights"][0], expected.mean[0], atol=1e-5)
    assert torch.allclose(state.tensors["precision"][0], expected.precision[0], atol=1e-4)
    assert state.tensors["member"].tolist() == [
        int(expected.mean[0] @ served.net[0] < expected.mean[0] @ served.net[1]),
        1,
    ]
    assert state.num_pairs.tolist() == [2, 0]


def test_members_write_each_for_its_user(served: PolicyPortfolio) -> None:
    """In one batch as alone, with the adapter of the member, and not the same."""
    sharpened(served)
    state = UserState({"member": torch.tensor([0, 1, 0])}, torch.zeros(3, dtype=torch.long))
    mixed = sample(served, PROMPTS, state, max_new_tokens=6)
    for member in (0, 1):
        alone = sample(served, PROMPTS, state._replace(tensors={"member": torch.full((3,), member)}), max_new_tokens=6)
        assert [mixed[row] == alone[row] for row in range(3)] == [int(m) == member for m in state.tensors["member"]]


def test_the_reward_is_the_mix_of_the_member(served: PolicyPortfolio) -> None:
    state = UserState({"member": torch.tensor([0, 1])}, torch.zeros(2, dtype=torch.long))
    tokens = served.causal_lm.represent(["ab", "ab"], ["a b", "a b"])
    assert isinstance(tokens, Tokens)
    assert served.score(tokens, state).tolist() == pytest.approx([2 / 8, 6 / 8])
    with pytest.raises(ValueError, match="made by plm portfolio"):
        served.loss(None)  # type: ignore[arg-type]


def test_a_checkpoint_keeps_members_and_nothing_of_the_language_model(served: PolicyPortfolio) -> None:
    from plm.checkpoint import load_method, read_checkpoint

    with saved(served) as path:
        assert not any(name.startswith("policy.") for name in read_checkpoint(path)["state_dict"])
        again = load_method(path)
    assert isinstance(again, PolicyPortfolio) and torch.equal(again.adapters, served.adapters)
    options: dict[str, int] = {"max_new_tokens": 5, "seed": 1}
    one, two = (sample(made, PROMPTS, made.user_states(torch.tensor([0, 1, 0])), **options) for made in (served, again))
    assert one == two


def test_a_member_is_exported_as_its_adapter(served: PolicyPortfolio, tmp_path: Path) -> None:
    served.export(tmp_path, served.user_states(torch.tensor([0])))
    member = int(served.user_states(torch.tensor([0])).tensors["member"])
    assert torch.equal(served.shape.read(tmp_path), served.adapters[member])
    served.decoding = "logits"
    with pytest.raises(ValueError, match="no single adapter"):
        served.export(tmp_path, served.user_states(torch.tensor([0])))


# ---------------------------------------------------------------------- training
def candidates() -> CandidatePool:
    """Two prompts, three responses, the first the longest; one objective ties on the second prompt."""
    scores = np.array([[[1.0, 0.0], [0.5, 0.6], [0.0, 1.0]], [[0.3, 0.2], [0.3, 0.9], [0.3, 0.4]]])
    texts = ["a b c d", "a b", "a", "b c d", "b c", "b"]
    return CandidatePool(["ab", "b"], texts, np.arange(6).reshape(2, 3), scores, np.zeros(2, dtype=bool))


def test_a_weight_vector_compares_its_best_with_its_worst() -> None:
    table = weighted_pairs(candidates(), np.array([[1.0, 0.0], [0.4, 0.6]]))
    found = [
        (table.user_ids[user], table.prompts[prompt], *(table.responses[table.items[side, 1]] for side in sides))
        for user, prompt, *sides in zip(table.user, table.prompt, table.chosen, table.rejected, strict=True)
    ]
    assert found == [  # the first finds all responses to the second prompt equal
        ("000000", "ab", "a b c d", "a"),
        ("000001", "ab", "a", "a b c d"),
        ("000001", "b", "b c", "b c d"),
    ]


def test_adapters_of_several_weight_vectors_are_trained_as_if_alone(tmp_path: Path) -> None:
    """And each prefers what its weights prefer."""
    fit = LoRADPOFit(rank=2, alpha=4.0, lr=1e-2, epochs=3, pairs_per_step=2)
    backbone, weights = CausalLM(tiny_causal_lm().model), np.array([[0.9, 0.1], [0.1, 0.9]])
    pool = candidates()
    both = train_adapters(pool, weights, backbone, fit, str(tmp_path))
    alone = train_adapters(pool, weights[1:], backbone, fit, str(tmp_path))
    assert torch.allclose(both[1], alone[0], atol=1e-5) and not torch.allclose(both[0], both[1], atol=1e-3)
    made = portfolio("own")
    read = backbone.represent(["ab", "ab"], ["a b c d", "a"])
    assert isinstance(read, Tokens)
    with torch.no_grad():
        ratio = [(made.logps(read, one[None]).total - made.logps(read).total).diff().item() for one in both]
    assert ratio[0] < 0 < ratio[1]


@pytest.mark.parametrize("alike", [[1], [0, 1]])
def test_who_finds_everything_alike_is_served_by_the_unaligned_policy(
    tmp_path: Path, alike: list[int], tokens: Tokens
) -> None:
    """And the others are trained as if nobody else had been there."""
    pool = candidates()
    pool.scores[..., alike] = 0.5 + 1e-15 * np.arange(3)[:, None]
    fit, backbone = LoRADPOFit(rank=2, alpha=3.0, epochs=1), CausalLM(tiny_causal_lm().model)
    rows = train_adapters(pool, np.eye(2)[[1, 0]], backbone, fit, str(tmp_path))
    made = portfolio("own")
    made.extend(rows, torch.eye(2))
    unaligned = made.total_logps(tokens)
    same = [torch.equal(made.member_logps(tokens, torch.full((3,), row)), unaligned) for row in (0, 1)]
    assert same == [True, 0 in alike]
    if 0 not in alike:
        alone = train_adapters(pool, np.eye(2)[:1], backbone, fit, str(tmp_path))
        assert torch.allclose(rows[1], alone[0], atol=1e-5)
    counts = [weighted_pairs(pool, row[None]).num_pairs for row in np.eye(2)]
    assert [count == 0 for count in counts] == [0 in alike, True]


def test_oracles_want_portfolios_that_fit() -> None:
    made = portfolio("own")
    with pytest.raises(ValueError, match="decoding merged or logits, got 2 adapters and decoding 'own'"):
        MixedPolicies(made, adapters(made), PROMPTS)
    with pytest.raises(ValueError) as error:
        TrainedPolicies(made, lambda weights: weights, [], num_samples=0, max_new_tokens=0, beta=float("nan"))
    assert str(error.value).splitlines() == [
        "TrainedPolicies.num_samples: expected at least 1, got 0",
        "TrainedPolicies.max_new_tokens: expected at least 1, got 0",
        "TrainedPolicies.beta: expected a finite number >= 0, got nan",
        "TrainedPolicies.prompts: expected some to measure on, got none",
    ]
    oracle = TrainedPolicies(portfolio("merged"), lambda weights: torch.zeros(2, made.shape.num_parameters), PROMPTS)
    with pytest.raises(ValueError, match="decoding own, got 'merged'"):
        oracle.solve(np.eye(2))
