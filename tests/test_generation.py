"""Writing texts: against transformers' own generate, exact distributions, and batches that do not matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Tensor

from plm.backbones import CausalLM, Completion, HashingBackbone, Policy, completion_tokens, draw, gumbel_noise
from plm.checkpoint import TextEncoder, load_method
from plm.generation import Sample, best_of_n, sample, sample_logps
from plm.method import PersonalizationMethod
from plm.method.policy import PolicyMethod
from plm.methods.bradley_terry import BradleyTerry
from plm.methods.lore import LoRe
from plm.methods.pal import PAL
from plm.methods.palm import PALM
from plm.methods.sft import SFT
from plm.methods.vpl import VPL
from plm.testing import saved
from plm.types import Context, PreferenceBatch, Tokens, UserState

PROMPTS = ["hello there", "a", "what is this thing?", "to be", "hello there, you"]
KINDS = pytest.mark.parametrize("kind", ["gpt2", "llama"])
Folder = Callable[[str], Path]


class AdaptedPolicy(PolicyMethod):
    """One LoRA adapter per user, drawn at random."""

    user_tables = ("adapters",)

    def __init__(self, num_users: int, feature_dim: int, backbone: dict[str, Any] | None = None, lr: float = 0.1):
        super().__init__(num_users=num_users, feature_dim=feature_dim, backbone=backbone, lr=lr)

    def build(self, policy: Policy) -> None:
        lora = policy.add_lora(2, 4.0, None)
        torch.manual_seed(1)
        self.adapters = torch.nn.Parameter(torch.randn(self.num_users, lora.num_parameters) / 3)

    def writing(self, users: UserState, prompts: Sequence[str]) -> Any:
        return self.policy.write(users.tensors["adapter"])

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        raise NotImplementedError

    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        assert isinstance(responses, Tokens)
        with torch.no_grad():
            return self.logps(responses, users.tensors["adapter"]).total

    def _adapt(self, context: Context) -> UserState:
        """So many times the adapter of ones as the chosen responses have tokens."""
        assert isinstance(context.chosen, Tokens)
        count = context.chosen.completion_mask.sum((1, 2))[:, None]
        return UserState({"adapter": count * torch.ones(1, self.adapters.shape[1])}, context.mask.sum(1))

    def user_states(self, user_index: Tensor) -> UserState:
        return UserState({"adapter": self.adapters[user_index]}, torch.ones(len(user_index)).long())

    def population_state(self, num_users: int) -> UserState:
        return UserState({"adapter": torch.zeros(num_users, self.adapters.shape[1])}, torch.zeros(num_users).long())


def policy_of(causal_lm: Folder, kind: str = "gpt2", **options: Any) -> Policy:
    return Policy(CausalLM(str(causal_lm(kind)), **options))


def adapted(causal_lm: Folder, kind: str = "gpt2") -> AdaptedPolicy:
    method = AdaptedPolicy(3, 16, CausalLM(str(causal_lm(kind))).spec())
    method.user_ids = ["anna", "ben", "cleo"]
    method.configure_model()
    return method.eval()


def ids_of(written: Sequence[Sequence[Sample]]) -> list[list[tuple[int, ...]]]:
    return [[one.token_ids for one in responses] for responses in written]


def generated(policy: Policy, prompt: str, **options: Any) -> tuple[int, ...]:
    """What transformers writes on one prompt, greedily."""
    ids = torch.tensor([policy.backbone.prompt_tokens(prompt)])
    out = policy.network.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, use_cache=True, **options
    )
    return tuple(out[0, ids.shape[1] :].tolist())


# ---------------------------------------------------------------------- what is written
@KINDS
@pytest.mark.parametrize("least", [0, 6])
def test_greedy_texts_are_those_of_transformers(causal_lm: Folder, kind: str, least: int) -> None:
    policy = policy_of(causal_lm, kind)
    policy.network.generation_config.eos_token_id = [2, *range(40, 60)]  # so many ends that texts do end
    out = sample(policy, PROMPTS, max_new_tokens=20, min_new_tokens=least, temperature=0)
    for prompt, [one] in zip(PROMPTS, out, strict=True):
        assert one.token_ids == generated(policy, prompt, max_new_tokens=20, min_new_tokens=least)
    lengths = {len(one.token_ids) for [one] in out}
    assert len(lengths) > 1 and min(lengths) > least


@KINDS
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 5}, {"temperature": 2.0, "top_p": 0.6}])
def test_tokens_are_drawn_from_the_warped_softmax(causal_lm: Folder, kind: str, settings: dict[str, Any]) -> None:
    """Chi-square against the softmax of transformers' logits, warped by hand."""
    policy = policy_of(causal_lm, kind)
    with torch.no_grad():
        logits = policy.network(torch.tensor([policy.backbone.prompt_tokens("hello there")])).logits[0, -1].double()
    chances = (logits / settings.get("temperature", 1.0)).softmax(-1)
    order = chances.argsort(descending=True)
    if "top_k" in settings:
        chances[order[settings["top_k"] :]] = 0
    if "top_p" in settings:
        before = chances[order].cumsum(-1) - chances[order]  # kept while the more likely ones do not suffice
        chances[order[before >= settings["top_p"]]] = 0
    chances /= chances.sum()
    num = 6000
    [written] = sample(policy, ["hello there"], num_samples=num, max_new_tokens=1, seed=3, **settings)
    counts = np.bincount([one.token_ids[0] for one in written], minlength=len(chances))
    expected = num * chances.numpy()
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    seen = [*counts[common], counts[~common].sum()]
    wanted = [*expected[common], expected[~common].sum()]
    if wanted[-1] < 1e-9:
        seen, wanted = seen[:-1], wanted[:-1]
    assert common.sum() >= 3 and chisquare(seen, wanted).pvalue > 0.01


def test_noise_is_splitmix64_and_gumbel() -> None:
    """Against the generator in Python's integers; and its distribution, by Kolmogorov and Smirnov."""
    keys = torch.tensor([0, 1234567, -(2**63)])
    ours = gumbel_noise(keys, torch.arange(4), 3)
    for row, key in enumerate(keys.tolist()):
        for token in range(4):
            x = (key + (3 * 2**32 + token + 1) * 0x9E3779B97F4A7C15) % 2**64
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
            x ^= x >> 31
            expected = -np.log(-np.log(((x >> 11) + 0.5) / 2**53))
            assert float(ours[row, token]) == pytest.approx(expected, rel=1e-12)
    many = gumbel_noise(torch.arange(100) * 7919, torch.arange(500), 0)
    assert kstest(many.flatten().numpy(), "gumbel_r").pvalue > 0.01
    later = gumbel_noise(torch.arange(100) * 7919, torch.arange(500), 1)
    for one, two in ((many, later), (many[:, 1:], many[:, :-1]), (many[1:], many[:-1])):
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1])) < 0.02


@pytest.mark.parametrize("size", [3, 8191, 20000])  # fewer tokens than are compared, one block, several
def test_a_draw_is_the_largest_with_noise_in_float64(size: int) -> None:
    """As if all noise were written out, also of tokens that cannot be drawn, for many texts and places."""
    random = torch.Generator().manual_seed(size)
    keys = torch.randint(-(2**62), 2**62, (20,), generator=random)
    scores = 3 * torch.randn(20, size, generator=random)
    scores[:10, 2:-1] = -torch.inf
    for place in (0, 7):
        expected = (scores + gumbel_noise(keys, torch.arange(size), place)).argmax(-1)
        assert torch.equal(draw(scores, keys, place), expected)


@KINDS
def test_a_text_does_not_depend_on_its_company(causal_lm: Folder, kind: str) -> None:
    """Alone, in a crowd, in another order, in batches of another size, beside more samples or longer ones."""
    policy = policy_of(causal_lm, kind)
    settings: dict[str, Any] = {"max_new_tokens": 15, "temperature": 3.0, "seed": 5}
    crowd = ids_of(sample(policy, PROMPTS, num_samples=4, **settings))
    assert len({ids for row in crowd for ids in row}) == 20
    for prompt, together in zip(PROMPTS, crowd, strict=True):
        assert ids_of(sample(policy, [prompt], num_samples=2, **settings)) == [together[:2]]
    backwards = ids_of(sample(policy, PROMPTS[::-1], num_samples=4, batch_tokens=100, **settings))
    assert backwards[::-1] == crowd
    longer = ids_of(sample(policy, PROMPTS, num_samples=4, **{**settings, "max_new_tokens": 25}))
    assert [[ids[:15] for ids in row] for row in longer] == crowd
    assert ids_of(sample(policy, PROMPTS, num_samples=4, **{**settings, "seed": 6})) != crowd


def test_prompts_may_have_seeds_of_their_own(causal_lm: Folder) -> None:
    policy = policy_of(causal_lm)
    out = sample(policy, PROMPTS[:3], max_new_tokens=8, seed=[4, 5, 4])
    assert out == [sample(policy, [PROMPTS[row]], max_new_tokens=8, seed=(4, 5, 4)[row])[0] for row in range(3)]
    with pytest.raises(ValueError, match="one seed, or one per prompt, got 2 for 3"):
        sample(policy, PROMPTS[:3], max_new_tokens=8, seed=[4, 5])


@KINDS
def test_padding_on_the_left_changes_nothing(causal_lm: Folder, kind: str) -> None:
    policy = policy_of(causal_lm, kind)
    ids = policy.backbone.prompt_tokens("hello")
    alone = completion_tokens([Completion(ids, [])])
    padded = completion_tokens([Completion(ids, []), Completion(ids * 3, [])], left=True)
    assert not padded.attention_mask[0, :10].any()
    one, two = policy.write(), policy.write()
    assert torch.allclose(one.start(alone)[0], two.start(padded)[0], atol=1e-5)
    for token in (5, 17, 40):
        assert torch.allclose(one.step(torch.tensor([token]))[0], two.step(torch.tensor([token, 3]))[0], atol=1e-5)


@KINDS
def test_texts_end_where_they_end(causal_lm: Folder, kind: str) -> None:
    """Ended texts leave the batch; the others go on as if alone."""
    policy = policy_of(causal_lm, kind)
    policy.network.generation_config.eos_token_id = [2, 30, 31, 32, 33]
    assert policy.end_tokens == [2, 30, 31, 32, 33]
    settings: dict[str, Any] = {"max_new_tokens": 30, "temperature": 4.0, "num_samples": 8}
    out = sample(policy, PROMPTS, **settings)
    lengths = [len(one.token_ids) for row in out for one in row]
    assert min(lengths) < 10 and max(lengths) == 30
    for one in (one for row in out for one in row):
        assert not set(one.token_ids[:-1]) & set(policy.end_tokens)
        assert len(one.token_ids) == 30 or one.token_ids[-1] in policy.end_tokens
    assert [ids_of(sample(policy, [prompt], **settings))[0] for prompt in PROMPTS] == ids_of(out)
    later = sample(policy, PROMPTS, min_new_tokens=12, **settings)
    assert min(len(one.token_ids) for row in later for one in row) > 12


def test_the_text_is_what_follows_the_prompt(causal_lm: Folder) -> None:
    policy = policy_of(causal_lm)
    [[one]] = sample(policy, ["ab"], max_new_tokens=9, seed=1)
    kept = [token for token in one.token_ids if token > 2]
    assert one.text == "".join(chr(token + 29) for token in kept)
    [row] = sample(policy, [""], num_samples=2, max_new_tokens=3)  # from where a text begins
    assert len(row) == 2
    counted: list[int] = []
    sample(policy, PROMPTS, num_samples=3, max_new_tokens=2, batch_tokens=50, progress=counted.append)
    assert sum(counted) == 15 and len(counted) > 1


# ---------------------------------------------------------------------- users
@KINDS
def test_users_are_mixed_within_a_batch(causal_lm: Folder, kind: str) -> None:
    """Each text is what transformers writes with the user's B A added to the weights."""
    method = adapted(causal_lm, kind)
    lora = method.policy.lora
    assert lora is not None
    whose = [2, 0, 1, 1, 0]
    users = method.user_states(torch.tensor(whose))
    out = sample(method, PROMPTS, users, max_new_tokens=12, temperature=0)
    plain = sample(method.policy, PROMPTS, max_new_tokens=12, temperature=0)
    assert ids_of(out) != ids_of(plain) == ids_of(sample(method, PROMPTS, max_new_tokens=12, temperature=0))
    for user in range(3):
        merged = policy_of(causal_lm, kind)
        modules = dict(merged.network.named_modules())
        matrices = lora.matrices(method.adapters[user].detach())
        for place, a, b in zip(lora.places, matrices[::2], matrices[1::2], strict=True):
            change = lora.scale * b @ a
            weight = modules[place.name].weight
            weight.data += change.T if place.is_conv else change
        for prompt, owner, [one] in zip(PROMPTS, whose, out, strict=True):
            if owner == user:
                assert one.token_ids == generated(merged, prompt, max_new_tokens=12)


def test_copies_of_a_prompt_keep_their_adapters(causal_lm: Folder) -> None:
    """Several samples share one reading of the prompt; those of one user are the same alone."""
    method = adapted(causal_lm)
    settings: dict[str, Any] = {"num_samples": 3, "max_new_tokens": 10, "temperature": 3.0}
    users = method.user_states(torch.tensor([0, 1, 2, 0, 1]))
    together = ids_of(sample(method, PROMPTS, users, **settings))
    for row, prompt in enumerate(PROMPTS):
        alone = sample(method, [prompt], users.take(torch.tensor([row])), **settings)
        assert ids_of(alone) == [together[row]]


def test_a_loaded_policy_writes_for_users_by_id(causal_lm: Folder) -> None:
    method = adapted(causal_lm)
    with saved(method) as path:
        assert not any(name.startswith("policy.") for name in torch.load(path, weights_only=True)["state_dict"])
        loaded = load_method(path)
        assert isinstance(loaded, AdaptedPolicy)
        settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 2.0}
        expected = sample(method, PROMPTS[:2], method.user_states(torch.tensor([1, 2])), **settings)
        assert sample(loaded, PROMPTS[:2], user_id=["ben", "cleo"], **settings) == expected
        both = [*PROMPTS[:2], *PROMPTS[:2]]
        with pytest.warns(UserWarning, match="unknown users are treated as the population: 'zoe'"):
            out = sample(loaded, both, user_id=["ben", "cleo", "zoe", "zoe"], **settings)
        assert out == expected + sample(method.policy, PROMPTS[:2], **settings)
        score = loaded.score([" you", " me"], user_id="anna", prompts=["hello", "a"])
        tokens = method.causal_lm.represent(["hello", "a"], [" you", " me"])
        assert torch.allclose(score, method.score(tokens, method.user_states(torch.tensor([0, 0]))), atol=1e-5)


# ---------------------------------------------------------------------- choosing
def test_the_best_of_n_is_each_users_favourite(causal_lm: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature method: one pool for all users, encoded once, against the argmax of ``score`` user by user."""
    policy = policy_of(causal_lm)
    reward = Direction(3, 24, backbone=HashingBackbone(dim=24, ngrams=2).spec())
    reward.encode = TextEncoder(reward, HashingBackbone(dim=24, ngrams=2).spec())
    prompts = [prompt for prompt in PROMPTS[:3] for _ in range(3)]
    users = reward.user_states(torch.tensor([0, 1, 2] * 3))
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 3.0, "seed": 2}
    calls: list[int] = []
    encode = HashingBackbone.encode
    monkeypatch.setattr(HashingBackbone, "encode", lambda self, texts: calls.append(len(texts)) or encode(self, texts))
    monkeypatch.setattr("plm.generation._SCORED", 10)
    best = best_of_n(policy, reward, prompts, users, 7, **settings)
    assert calls == [21]
    pool = sample(policy, PROMPTS[:3], num_samples=7, **settings)
    chosen = set()
    for row, (prompt, one) in enumerate(zip(prompts, best, strict=True)):
        texts = [candidate.text for candidate in pool[PROMPTS.index(prompt)]]
        state = users.take(torch.full((7,), row))
        rewards = reward.score(texts, state, prompts=prompt)
        assert one.text == texts[int(rewards.argmax())] and one.reward == pytest.approx(float(rewards.max()), abs=1e-5)
        chosen.add((prompt, one.text))
    assert len(chosen) > 3  # tastes differ


class Direction(BradleyTerry):
    """A direction of their own for each user."""

    def user_states(self, user_index: Tensor) -> UserState:
        torch.manual_seed(3)
        return UserState(
            {"direction": torch.randn(3, self.feature_dim)[user_index]}, torch.ones(len(user_index)).long()
        )

    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        assert isinstance(responses, Tensor)
        return (responses * users.tensors["direction"]).sum(-1)


@pytest.mark.parametrize(
    ("method_class", "options"),
    [
        (BradleyTerry, {}),
        (LoRe, {}),
        (PAL, {}),
        (PAL, {"num_prototypes": 2, "variant": "B"}),  # reads the prompt's own features
        (VPL, {}),
        (PALM, {"num_objectives": 3, "size": 3}),
    ],
    ids=["BradleyTerry", "LoRe", "PAL", "PAL of prompts", "VPL", "PALM"],
)
def test_the_best_of_n_by_every_reward_method(
    causal_lm: Folder, method_class: type[PersonalizationMethod], options: dict[str, Any]
) -> None:
    """Against the argmax of ``score``, for users who lie around the population at random."""
    torch.manual_seed(0)
    spec = HashingBackbone(dim=24, ngrams=2).spec()
    reward = method_class(3, 24, backbone=spec, **options).eval()
    with torch.no_grad():
        for value in reward.parameters():
            value += 0.5 * torch.randn_like(value)
    encoder = TextEncoder(reward, spec)
    reward.encode, reward.encode_prompts = encoder, encoder.prompts
    middle = reward.population_state(3)
    tensors = {
        name: value + 0.5 * torch.randn(value.shape) if value.is_floating_point() else value  # not a member's number
        for name, value in middle.tensors.items()
    }
    users = UserState(tensors, torch.ones(3, dtype=torch.long))
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 3.0, "seed": 2}
    best = best_of_n(policy_of(causal_lm), reward, PROMPTS[:3], users, 6, **settings)
    pool = sample(policy_of(causal_lm), PROMPTS[:3], num_samples=6, **settings)
    for row, (prompt, candidates, one) in enumerate(zip(PROMPTS, pool, best, strict=False)):
        texts = [candidate.text for candidate in candidates]
        rewards = reward.score(texts, users.take(torch.full((6,), row)), prompts=prompt).detach()
        assert rewards.std() > 1e-6
        assert one.text == texts[int(rewards.argmax())] and one.reward == pytest.approx(float(rewards.max()), abs=1e-5)


def test_empty_responses_are_never_the_best(causal_lm: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cannot be judged, not even by a reward that likes short texts; a prompt with nothing else is named."""
    reward = BradleyTerry(1, 24, backbone=HashingBackbone(dim=24, ngrams=2).spec())
    reward.encode = TextEncoder(reward, HashingBackbone(dim=24, ngrams=2).spec())
    with torch.no_grad():
        for value in reward.parameters():
            value += torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    drawn = [["", "b b", "cd"], ["e", "", ""]]
    pool = [[Sample(text, (0,) * bool(text)) for text in row] for row in drawn]
    monkeypatch.setattr("plm.generation.sample", lambda *args, **settings: pool)
    first, second = best_of_n(policy_of(causal_lm), reward, ["one", "two"], n=3, max_new_tokens=4)
    rewards = reward.score(["b b", "cd"], prompts="one").detach()
    number = 1 + int(rewards.argmax())
    assert first == (drawn[0][number], pytest.approx(float(rewards.max()), abs=1e-5), number)
    assert (second.text, second.number) == ("e", 0)
    pool[1] = 3 * pool[1][1:2]
    with pytest.raises(
        ValueError, match=r"not empty among 3, got none to the prompt 'two'; raise n \(--best_of\), or set min"
    ):
        best_of_n(policy_of(causal_lm), reward, ["one", "two"], n=3, max_new_tokens=4)


def test_the_best_of_n_by_a_method_on_tokens(causal_lm: Folder) -> None:
    """The likeliest of n under another model; a method may also write, for its population."""
    judge: PersonalizationMethod = SFT(num_users=1, feature_dim=16, backbone=CausalLM(str(causal_lm("llama"))).spec())
    judge.configure_model()
    with saved(judge) as path:
        judge = load_method(path)
    assert judge.score([]).shape == (0,)
    writer = adapted(causal_lm)
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 2.0}
    best = best_of_n(writer, judge, PROMPTS[:2], n=5, **settings)
    for prompt, one in zip(PROMPTS, best, strict=False):
        texts = [
            candidate.text
            for [row] in [sample(writer.policy, [prompt], num_samples=5, **settings)]
            for candidate in row
        ]
        rewards = judge.score(texts, prompts=prompt)
        assert one.text == texts[int(rewards.argmax())]


@KINDS
def test_the_log_probability_of_what_was_written(causal_lm: Folder, kind: str) -> None:
    """Against log-softmax of transformers' logits, one text at a time."""
    policy = policy_of(causal_lm, kind)
    rows = [one for [one] in sample(policy, PROMPTS, max_new_tokens=9, temperature=2.0)]
    ours = sample_logps(policy, PROMPTS, rows, batch_tokens=60)
    for prompt, one, value in zip(PROMPTS, rows, ours.tolist(), strict=True):
        ids = policy.backbone.prompt_tokens(prompt)
        with torch.no_grad():
            logps = policy.network(torch.tensor([[*ids, *one.token_ids]])).logits[0].double().log_softmax(-1)
        expected = sum(float(logps[len(ids) + place - 1, token]) for place, token in enumerate(one.token_ids))
        assert value == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "num_samples: expected at least 1, got 0"),
        ({"temperature": -0.1}, "temperature: expected a finite number >= 0, got -0.1"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"min_new_tokens": 9}, "min_new_tokens: expected 0 to max_new_tokens=5, got 9"),
        ({"top_k": 0, "top_p": 0.0}, "top_k: expected at least 1, got 0\ntop_p: expected a share above 0, 1 at most"),
        ({"batch_tokens": 0}, "batch_tokens: expected at least 1, got 0"),
        ({"user_id": "anna"}, "a Policy writes for nobody in particular"),
    ],
)
def test_settings_out_of_range_are_refused(causal_lm: Folder, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        sample(policy_of(causal_lm), ["a"], **{"max_new_tokens": 5, **change})


def test_prompts_and_users_that_do_not_fit_are_refused(causal_lm: Folder) -> None:
    policy, method = policy_of(causal_lm), adapted(causal_lm)
    for prompts in ([], "a text"):
        with pytest.raises(ValueError, match="a list of at least one prompt, got"):
            sample(policy, prompts, max_new_tokens=5)
    with pytest.raises(ValueError, match=r"at most 59 tokens, the 64 of .* less max_new_tokens=5, got 60: 'xxx"):
        sample(policy, ["a", "x" * 60], max_new_tokens=5)
    with pytest.raises(ValueError, match="leaves room for a response, got 70 tokens"):
        sample(policy, ["x" * 70], max_new_tokens=5)
    short = policy_of(causal_lm, max_prompt_length=40)
    assert len(sample(short, ["x" * 70], max_new_tokens=5)) == 1
    state = method.population_state(2)
    with pytest.raises(ValueError, match="one user per prompt, got 2 for 1 prompts"):
        sample(method, ["a"], state, max_new_tokens=5)
    with pytest.raises(ValueError, match="either users or user_id, got both"):
        sample(method, ["a"], state, user_id="anna", max_new_tokens=5)
    with pytest.raises(ValueError, match="this method knows none; load it with"):
        sample(method, ["a"], user_id="anna", max_new_tokens=5)
    with pytest.raises(ValueError, match="got a method without an encoder; load it"):
        best_of_n(policy, method, ["a"], n=2, max_new_tokens=5)
    with pytest.raises(ValueError, match="expected n >= 1, got 0"):
        best_of_n(policy, method, ["a"], n=0, max_new_tokens=5)
    with pytest.warns(UserWarning, match="writes the same text 2 times"):
        sample(policy, ["a"], num_samples=2, max_new_tokens=1, temperature=0)


def test_a_missing_chat_template_is_told(causal_lm: Folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="template='chat' needs one chat template"):
        sample(policy_of(causal_lm, template="chat"), ["a"], max_new_tokens=5)
    with pytest.raises(ValueError, match="expected `model` to be the folder of a Hugging Face model"):
        Policy(CausalLM(str(tmp_path / "nothing")))


def test_a_policy_is_left_as_it_was(causal_lm: Folder) -> None:
    """Also in the middle of training, with blocks that run again."""
    policy = Policy(CausalLM(str(causal_lm("gpt2"))), gradient_checkpointing=True).train()
    before = [module.training for module in policy.modules()]
    assert any(before)
    out = ids_of(sample(policy, PROMPTS, max_new_tokens=6))
    assert [module.training for module in policy.modules()] == before
    assert out == ids_of(sample(policy_of(causal_lm), PROMPTS, max_new_tokens=6))
