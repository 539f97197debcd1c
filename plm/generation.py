"""Write text with a policy: `sample` draws what a method's users would write, `best_of_n` what they would prefer.

Axes: B texts of one batch, T tokens, V vocabulary, U users.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plm.backbones import (
    Completion,
    Policy,
    RemotePolicy,
    TextWriter,
    Warpers,
    batches_by_length,
    completion_tokens,
    draw,
    text_key,
)
from plm.functional import response_logps
from plm.messages import Problems
from plm.method import PersonalizationMethod
from plm.method.abilities import LatentWriter, Mixable, Writer
from plm.types import Tokens, UserState, take_rows

BATCH_TOKENS = 16384
"""Most tokens, of prompts and responses, that are written at once by default."""
_SCORED = 1024  # candidates whose features and users' states are side by side


class Sample(NamedTuple):
    """A response that a policy has written."""

    text: str
    token_ids: tuple[int, ...]
    """With the token that ended it, unless it was cut at ``max_new_tokens``."""


class Best(NamedTuple):
    """The response a user would prefer among n."""

    text: str
    reward: float
    """Comparable within one user only."""
    number: int
    """Which of the n it is."""


@torch.no_grad()
def sample(
    method: PersonalizationMethod | Policy,
    prompts: Sequence[str],
    users: UserState | None = None,
    *,
    max_new_tokens: int,
    rows: Tensor | None = None,
    user_id: str | Sequence[str] | None = None,
    num_samples: int = 1,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> list[list[Sample]]:
    """Write responses to prompts, each for its user; users are mixed within a batch.

    What is random depends on the seed, the prompt and the number of the sample alone. A response is therefore the same
    whatever else is asked for, up to rounding where two tokens are about equally likely, and two policies that write
    on the same prompt with the same seed differ by what they are, not by luck.

    Args:
        method: Who writes: a method for its users, or a policy as it is.
        prompts: P prompts, plain texts or JSON lists of chat messages.
        users: States with one row per prompt, or with ``rows``; instead of ``user_id``. Default: the population.
        max_new_tokens: Tokens after which a response is cut.
        rows: ``(P,)`` int64, the row of ``users`` of each prompt.
        user_id: One id for all prompts or one each, for a method of ``load_method``; an unknown id gets the
            population state and a warning.
        num_samples: Responses to each prompt, which is read once for all of them.
        min_new_tokens: Tokens before which a response does not end.
        temperature: What vocabulary scores are divided by; 0 always takes the most likely token.
        top_k: Draw from so many most likely tokens.
        top_p: Draw from the most likely tokens that together have this probability.
        seed: Seed of what is random, one for all prompts or one each.
        batch_tokens: Most tokens, of prompts and responses, that are written at once.
        progress: Called with the number of responses finished since the last call.

    Returns:
        ``num_samples`` responses to each prompt.

    Raises:
        ValueError: If the method writes nothing, an argument is out of range, a prompt leaves no room for
            ``max_new_tokens``, or users or ids do not fit the prompts or the method.
    """
    problems = Problems()
    problems.at_least(1, num_samples=num_samples, max_new_tokens=max_new_tokens, top_k=top_k, batch_tokens=batch_tokens)
    problems.numbers(temperature=temperature)
    if not 0 <= min_new_tokens <= max_new_tokens:
        problems.add("min_new_tokens", f"0 to max_new_tokens={max_new_tokens}", min_new_tokens)
    if top_p is not None and not 0 < top_p <= 1:
        problems.add("top_p", "a share above 0, 1 at most", top_p)
    problems.check()
    if not prompts or isinstance(prompts, str):
        raise ValueError(f"expected a list of at least one prompt, got {prompts!r}")
    if temperature == 0 and num_samples > 1:
        warnings.warn(f"temperature=0 writes the same text {num_samples} times; set num_samples to 1", stacklevel=2)
    if not isinstance(method, Policy | Writer):
        raise ValueError(f"expected a method whose users write, got {type(method).__name__}; take best_of_n")
    policy = method if isinstance(method, Policy) else method.policy
    states, state_row = _states(method, len(prompts), users, user_id, rows)
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(f"expected one seed, or one per prompt, got {len(seeds)} for {len(prompts)} prompts")
    read = [policy.backbone.prompt_tokens(prompt) for prompt in prompts]
    _check_room(policy, prompts, read, max_new_tokens)
    ends = torch.tensor(policy.end_tokens, dtype=torch.long, device=policy.device)
    warp = None if temperature == 0 else Warpers(temperature, top_k, top_p)
    out: list[list[Sample]] = [[] for _ in prompts]
    was_training = policy.training
    policy.eval()
    try:
        lengths = [len(ids) + max_new_tokens for ids in read for _ in range(num_samples)]
        for places in batches_by_length(lengths, batch_tokens):
            batch = [divmod(place, num_samples) for place in places]
            order = [row for row, _ in batch]
            if not isinstance(method, LatentWriter):
                order = list(dict.fromkeys(order))  # a prompt is read once for all its texts
            text_keys = [text_key(seeds[row], prompts[row], number) for row, number in batch]
            keys = torch.tensor(text_keys, device=policy.device)
            writing: TextWriter
            if isinstance(method, Policy) or states is None:
                writing = policy.write()
            else:
                batch_prompts = [prompts[row] for row in order]
                batch_users, user_rows = _distinct(states, state_row[order], policy.device)
                if isinstance(method, LatentWriter):
                    row_users = method.latent_states(batch_users, user_rows, batch_prompts, keys)
                else:
                    row_users = batch_users.take(user_rows)
                writing = method.writing(row_users, batch_prompts)
            logits = writing.start(
                completion_tokens([Completion(read[row], []) for row in order], left=True).to(policy.device)
            )
            if len(batch) > len(order):
                place_of = {row: place for place, row in enumerate(order)}
                taken = torch.tensor([place_of[row] for row, _ in batch], device=policy.device)
                writing.take(taken)
                logits = logits[taken]
            written = _write(writing, logits, keys, warp, ends, min_new_tokens, max_new_tokens)
            for (row, _), ids in zip(batch, written, strict=True):
                words = ids[:-1] if ids[-1] in policy.end_tokens else ids
                out[row].append(Sample(policy.backbone.response_text(Completion(read[row], words)), tuple(ids)))
            if progress is not None:
                progress(len(batch))
    finally:
        policy.train(was_training)
    return out


def sample_texts(
    policy: PersonalizationMethod | Policy | RemotePolicy, prompts: Sequence[str], *, num_samples: int, **settings: Any
) -> list[list[str]]:
    """Write as `sample` does, for the population, also with a model that is served elsewhere; the texts alone."""
    if isinstance(policy, RemotePolicy):
        return policy.texts(prompts, num_samples, **settings)
    rows = sample(policy, prompts, num_samples=num_samples, **settings)
    return [[response.text for response in row] for row in rows]


def best_of_n(
    policy: PersonalizationMethod | Policy | RemotePolicy,
    method: PersonalizationMethod,
    prompts: Sequence[str],
    users: UserState | None = None,
    n: int = 16,
    *,
    user_id: str | Sequence[str] | None = None,
    **settings: Any,
) -> list[Best]:
    """Find the response that each prompt's user would prefer among n, for every method that scores responses.

    A prompt that is asked for several users is written on once, and its responses are encoded once.

    Args:
        policy: Who writes; a method does so for its population.
        method: Whose reward decides, from ``load_method``.
        prompts: P prompts.
        users: States of ``method`` with one row per prompt; instead of ``user_id``. Default: the population.
        n: Responses to choose from.
        user_id: One id for all prompts or one each.
        **settings: Arguments of `sample`, ``max_new_tokens`` among them.

    Returns:
        One response per prompt; the first of equals.

    Raises:
        ValueError: See `sample`; or if the method cannot encode texts, or all n responses to a prompt are empty: an
            empty one is never chosen.
    """
    if n < 1:
        raise ValueError(f"expected n >= 1, got {n!r}")
    if method.encode is None:
        raise ValueError("best_of_n got a method without an encoder; load it with plm.load_method(path)")
    states, state_row = _states(method, len(prompts), users, user_id)
    assert states is not None
    distinct = list(dict.fromkeys(prompts))
    written = sample_texts(policy, distinct, num_samples=n, **settings)
    return best_responses(method, prompts, dict(zip(distinct, written, strict=True)), states, state_row)


def best_responses(
    method: PersonalizationMethod,
    prompts: Sequence[str],
    responses: Mapping[str, Sequence[str]],
    states: UserState,
    state_row: Tensor,
) -> list[Best]:
    """Find the response that each prompt's user would prefer among those that were written, as `best_of_n` does.

    Args:
        method: Whose reward decides, from ``load_method``.
        prompts: P prompts.
        responses: Prompt -> n texts.
        states: States of users.
        state_row: ``(P,)`` int64, the row of ``states`` of each prompt.
    """
    assert method.encode is not None
    distinct = {prompt: row for row, prompt in enumerate(responses)}
    pool = [text for texts in responses.values() for text in texts]
    n = len(pool) // len(distinct)
    pool_prompts = [prompt for prompt in distinct for _ in range(n)]
    filled = torch.tensor([bool(text) for text in pool])
    empty = [prompt for prompt, row in distinct.items() if not filled[row * n : (row + 1) * n].any()]
    if empty:
        raise ValueError(
            f"expected a response that is not empty among {n}, got none to the prompt {empty[0]!r:.80}; raise n "
            "(--best_of), or set min_new_tokens"
        )
    written = filled.nonzero()[:, 0].tolist()
    written_prompts = [pool_prompts[place] for place in written]
    represented = method.encode(written_prompts, [pool[place] for place in written])
    prompt_features = method.encode_prompts(written_prompts) if method.encode_prompts is not None else None
    candidate = torch.tensor([[distinct[prompt] * n + number for number in range(n)] for prompt in prompts]).flatten()
    usable = filled[candidate].nonzero()[:, 0]
    encoded_row = (filled.cumsum(0) - 1)[candidate[usable]]
    rewards = []
    with torch.no_grad():
        user_rows = state_row.repeat_interleave(n)[usable]
        for start in range(0, len(usable), _SCORED):
            at = encoded_row[start : start + _SCORED].to(method.device)
            chosen = represented.take(at) if isinstance(represented, Tokens) else represented[at]
            batch_users, rows = _distinct(states, user_rows[start : start + _SCORED], method.device)
            prompt_rows = take_rows(prompt_features, at)
            rewards.append(method.score(chosen, batch_users, rows=rows, prompt_features=prompt_rows).float().cpu())
    table = torch.full((len(candidate),), -torch.inf)
    table[usable] = torch.cat(rewards)
    table = table.reshape(len(prompts), n)
    best = table.argmax(1)
    return [
        Best(pool[distinct[prompt] * n + place], float(table[row, place]), place)
        for row, (prompt, place) in enumerate(zip(prompts, best.tolist(), strict=True))
    ]


def mixture(method: PersonalizationMethod, weights: Mapping[str, float]) -> UserState:
    """The state of one writer whose reward is the weighted sum of the rewards of known users.

    Args:
        method: A method of ``load_method``.
        weights: User id -> finite weight.

    Raises:
        ValueError: If the method's users cannot be mixed, one is unknown, or the weights have no positive sum.
    """
    if not isinstance(method, Mixable):
        raise ValueError(f"users of {type(method).__name__} cannot be mixed; name users by --user")
    for user in weights:
        if user not in method.known_users.store:
            raise ValueError(f"--mix: no user {user!r}")
    if sum(weights.values()) <= 0:
        parts = " ".join(f"{user}={weight:g}" for user, weight in weights.items())
        raise ValueError(f"--mix: expected weights with a positive sum, got {parts!r}")
    return method.mixed(method.known_users(list(weights)), torch.tensor([list(weights.values())]))


@torch.no_grad()
def sample_logps(
    policy: Policy, prompts: Sequence[str], samples: Sequence[Sample], batch_tokens: int = BATCH_TOKENS
) -> Tensor:
    """Log-probability ``(B,)`` of B responses to B prompts under a policy, as it is, at temperature 1.

    Args:
        policy: Whose opinion is asked; its tokenizer must be that of the policy that wrote.
        prompts: The prompt of each response.
        samples: The responses, token by token as they were written.
        batch_tokens: Most tokens that are read at once.
    """
    rows = [
        Completion(policy.backbone.prompt_tokens(prompt), list(response.token_ids))
        for prompt, response in zip(prompts, samples, strict=True)
    ]
    out = torch.zeros(len(rows))
    for places in batches_by_length([sum(map(len, row)) for row in rows], batch_tokens):
        tokens = completion_tokens([rows[place] for place in places]).to(policy.device)
        hidden, token, row = policy.completions(tokens)
        out[places] = response_logps(policy.token_logps(hidden, token)[0], row, len(places)).total.cpu()
    return out


# ---------------------------------------------------------------------- writing
def _write(
    writing: TextWriter,
    logits: Tensor,
    keys: Tensor,
    warp: Warpers | None,
    ends: Tensor,
    min_new_tokens: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """Write B texts to their ends; a batch is narrowed when half of it has ended.

    Args:
        writing: A batch that has been started.
        logits: ``(B, V)`` of the first tokens.
        keys: ``(B,)`` seed of all that is random in a text.
        warp: How scores become a distribution; None = take the most likely token.
        ends: Ids that end a text.
        min_new_tokens: Tokens before which no text ends.
        max_new_tokens: Tokens after which all end.
    """
    num_texts, device = len(logits), logits.device
    tokens = torch.zeros(num_texts, max_new_tokens, dtype=torch.long, device=device)
    length = torch.full((num_texts,), max_new_tokens, device=device)
    row = torch.arange(num_texts, device=device)  # the text that each row of the batch is
    ended = torch.zeros(num_texts, dtype=torch.bool, device=device)
    for place in range(max_new_tokens):
        if place < min_new_tokens:
            logits = logits.index_fill(1, ends, -torch.inf)
        if warp is None:
            token = logits.argmax(-1)
        else:
            token = draw(warp(logits), keys[row], place)
        tokens[row, place] = token
        ends_here = torch.isin(token, ends) & ~ended
        length[row[ends_here]] = place + 1
        ended |= ends_here
        num_ended = int(ended.sum())
        if num_ended == len(ended) or place + 1 == max_new_tokens:
            break
        if 2 * num_ended >= len(ended):
            kept = (~ended).nonzero()[:, 0]
            writing.take(kept)
            row, token, ended = row[kept], token[kept], ended[kept]
        logits = writing.step(token)
    return [ids[:size] for ids, size in zip(tokens.tolist(), length.tolist(), strict=True)]


# ---------------------------------------------------------------------- arguments
def _states(
    method: PersonalizationMethod | Policy,
    num_prompts: int,
    users: UserState | None,
    user_id: str | Sequence[str] | None,
    rows: Tensor | None = None,
) -> tuple[UserState | None, Tensor]:
    """The distinct states of the prompts' users, and the row of each prompt in them; no states for a bare policy."""
    if isinstance(method, Policy):
        if users is not None or user_id is not None:
            raise ValueError("a Policy writes for nobody in particular, got users; give the method they belong to")
        return None, torch.zeros(num_prompts, dtype=torch.long)
    if users is not None and user_id is not None:
        raise ValueError("expected either users or user_id, got both")
    if users is not None:
        rows = torch.arange(users.num_users) if rows is None else rows.cpu()
        if len(rows) != num_prompts:
            raise ValueError(f"expected one user per prompt, got {len(rows)} for {num_prompts} prompts")
        return users, rows
    if user_id is None:
        return method.population_state(1), torch.zeros(num_prompts, dtype=torch.long)
    if method.find_users is None:
        raise ValueError("got user ids, but this method knows none; load it with plm.load_method(path)")
    ids = [user_id] * num_prompts if isinstance(user_id, str) else list(user_id)
    if len(ids) != num_prompts:
        raise ValueError(f"expected one user id per prompt, got {len(ids)} for {num_prompts} prompts")
    row_of = {name: row for row, name in enumerate(dict.fromkeys(ids))}
    return method.known_users(list(row_of)), torch.tensor([row_of[name] for name in ids])


def _distinct(states: UserState, rows: Tensor, device: torch.device) -> tuple[UserState, Tensor]:
    """The distinct states among those at ``rows`` ``(B,)``, and the place of each row in them; on a device."""
    used, place = torch.unique(rows, return_inverse=True)
    return states.take(used.to(states.num_pairs.device)).to(device), place.to(device)


def _check_room(policy: Policy, prompts: Sequence[str], read: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse prompts after which the model cannot read ``max_new_tokens`` more."""
    room = policy.backbone.max_tokens - max_new_tokens
    longest = max(range(len(read)), key=lambda row: len(read[row]))
    if len(read[longest]) > room:
        raise ValueError(
            f"expected prompts of at most {room} tokens, the {policy.backbone.max_tokens} of {policy.backbone.model!r} "
            f"less max_new_tokens={max_new_tokens}, got {len(read[longest])}: {prompts[longest][:60]!r}; lower "
            "max_new_tokens or set max_prompt_length"
        )
