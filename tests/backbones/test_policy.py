"""Language models as methods use them: tokens, log-probabilities, shared prompts, adapters and writing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from plm.backbones import Backbone, CausalLM, LoRA, Policy, ReferenceLogps, TooLong, completion_tokens
from plm.backbones.lora import default_targets
from plm.types import Tokens
from tests.logps import sequence_logps

CHOSEN = [("hello there", " my friend"), ("a", " b"), ("what is this thing?", " it is what")]
REJECTED = [("hello there", " no"), ("a", " something long"), ("what is this thing?", " x")]
KINDS = pytest.mark.parametrize("kind", ["gpt2", "llama"])
Folder = Callable[[str], Path]


def policy_of(causal_lm: Folder, kind: str) -> Policy:
    return Policy(CausalLM(str(causal_lm(kind))))


def tokens(policy: Policy, pairs: list[tuple[str, str]], left: bool = False) -> Tokens:
    return completion_tokens([policy.backbone.completion(*pair) for pair in pairs], left=left)


def total(policy: Policy, read: Tokens) -> torch.Tensor:
    hidden, token, row = policy.completions(read)
    return sequence_logps(policy.logits(hidden), token, row, read.num_rows).total


# ---------------------------------------------------------------------- texts to tokens
def test_a_response_is_closed_by_the_end_token(causal_lm: Folder) -> None:
    folder = str(causal_lm("gpt2"))
    assert CausalLM(folder).completion("ab", "c") == ([68, 69], [70, 2])
    assert CausalLM(folder, append_eos=False).completion("ab", "c").response == [70]
    assert CausalLM(folder, append_eos=False).completion("", "c") == ([1], [70])  # begins where a text begins


def test_the_end_of_a_prompt_and_the_beginning_of_a_response_are_kept(causal_lm: Folder) -> None:
    folder = str(causal_lm("gpt2"))
    short = CausalLM(folder, max_length=5, max_prompt_length=3)
    assert short.completion("abcdef", "ghi") == ([71, 72, 73], [74, 75])
    with pytest.raises(TooLong, match=r"got 6 tokens of at most 5.*raise max_length"):
        CausalLM(folder, max_length=5).completion("abcdef", "ghi")


def test_what_has_no_tokens_or_strange_ones_is_refused(causal_lm: Folder, tmp_path: Path) -> None:
    folder = causal_lm("gpt2")
    with pytest.raises(ValueError, match="at least one token, got ''"):
        CausalLM(str(folder)).completion("a", "")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 70}))
    with pytest.raises(ValueError, match="expected token ids below 70"):
        CausalLM(str(tmp_path)).completion("a", "z")
    with pytest.raises(ValueError, match="template='chat' needs one chat template"):
        CausalLM(str(folder), template="chat").completion("a", "b")
    with pytest.raises(ValueError, match="quantization='4bit' needs a CUDA device"):
        CausalLM(str(folder), quantization="4bit").load()


def test_a_chat_template_tells_where_the_reply_begins(causal_lm: Folder, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = causal_lm("llama")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}|{% endfor %}"
        "{% if add_generation_prompt %}[a]{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    prompt, response = CausalLM(str(tmp_path), template="chat").completion('[{"role":"user","content":"hi"}]', "yo")
    assert tokenizer.decode(prompt) == "[u]hi|[a]" and tokenizer.decode(response) == "yo|"
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}|{% endfor %}"
        "{% if add_generation_prompt %}[a]<think>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"finished replies begin as it asks for them, got '.*<think>' before"):
        CausalLM(str(tmp_path), template="chat").completion("hi", "yo")


def test_spec_rebuilds_it(causal_lm: Folder) -> None:
    lm = CausalLM(str(causal_lm("gpt2")), max_prompt_length=7, append_eos=False)
    again = Backbone.from_spec(lm.spec())
    assert isinstance(again, CausalLM) and again.key() == lm.key() and again.fingerprint() == lm.fingerprint()
    assert CausalLM(str(causal_lm("gpt2")), max_prompt_length=8).key() != lm.key()


# ---------------------------------------------------------------------- log-probabilities
@KINDS
def test_log_probabilities_are_those_of_the_whole_network(causal_lm: Folder, kind: str) -> None:
    """Against log-softmax of transformers' logits, one text at a time in float64, no padding."""
    policy = policy_of(causal_lm, kind)
    ours = total(policy, tokens(policy, CHOSEN))
    policy.network.double()
    for row, pair in enumerate(CHOSEN):
        prompt, response = policy.backbone.completion(*pair)
        logits = policy.network(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        expected = sum(logits[len(prompt) + place - 1, token] for place, token in enumerate(response))
        assert abs(float(expected) - float(ours[row])) < 1e-4


@KINDS
def test_padding_on_either_side_and_sharing_prompts_change_nothing(causal_lm: Folder, kind: str) -> None:
    policy = policy_of(causal_lm, kind)
    chosen, rejected = tokens(policy, CHOSEN), tokens(policy, REJECTED)
    apart = torch.cat([total(policy, chosen), total(policy, rejected)])
    assert torch.allclose(total(policy, tokens(policy, CHOSEN, left=True)), apart[:3], atol=1e-5)
    for one, two in ((chosen, rejected), (tokens(policy, CHOSEN, left=True), rejected)):
        hidden, token, row = policy.shared_completions(one, two)
        assert torch.allclose(sequence_logps(policy.logits(hidden), token, row, 6).total, apart, atol=2e-5)


def test_sharing_needs_one_prompt(causal_lm: Folder) -> None:
    policy = policy_of(causal_lm, "gpt2")
    with pytest.raises(ValueError, match="follow the same prompt; set share_prompts to false"):
        policy.shared_completions(tokens(policy, CHOSEN), tokens(policy, [("b", "c"), *REJECTED[1:]]))


def test_a_network_that_changes_its_logits_is_refused(causal_lm: Folder) -> None:
    policy = policy_of(causal_lm, "gpt2")
    policy.network.lm_head.register_forward_hook(lambda module, args, output: None)
    policy.network.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits * 2))
    with pytest.raises(ValueError, match="scales or bounds its logits"):
        policy.logits(torch.zeros(1, 16))


def test_reference_log_probabilities_are_features_of_width_one(causal_lm: Folder) -> None:
    lm = CausalLM(str(causal_lm("llama")), max_length=18)
    reference = ReferenceLogps(lm.spec())
    rows = [("x" * 30, "y"), *CHOSEN[:2]]
    logps = reference.encode([reference.render(*row) for row in rows])
    assert logps.shape == (3, 1) and logps[0, 0] == 0  # no room for a response: the data leave the pair out
    assert torch.allclose(logps[1:, 0], total(Policy(lm), tokens(Policy(lm), CHOSEN[:2])), atol=1e-5)
    assert reference.key() != lm.key()


# ---------------------------------------------------------------------- adapters
def adapters_of(policy: Policy, count: int) -> torch.Tensor:
    lora = policy.add_lora(4, 8, None)
    noise = torch.randn(count, lora.num_parameters, generator=torch.Generator().manual_seed(1))
    return lora.start(0) + 0.1 * noise


@KINDS
def test_every_group_of_texts_reads_with_its_own_adapter(causal_lm: Folder, kind: str) -> None:
    policy = policy_of(causal_lm, kind)
    read = tokens(policy, CHOSEN)
    plain = total(policy, read)
    adapters = adapters_of(policy, 3)
    with policy.adapted(adapters):
        mixed = total(policy, read)
    for row in range(3):
        with policy.adapted(adapters[row : row + 1]):
            assert torch.allclose(total(policy, read)[row], mixed[row], atol=1e-5)
    assert (mixed - plain).abs().min() > 1e-3, "the adapters must do something"
    assert policy.lora is not None
    with policy.adapted(policy.lora.start(0)[None]):
        assert torch.equal(total(policy, read), plain), "a fresh adapter changes nothing"
    assert torch.equal(total(policy, read), plain), "without adapters the network is untouched, bit for bit"


@KINDS
@pytest.mark.parametrize("rank", [2, 40])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_the_mean_adapter_is_the_nearest_of_its_rank_to_the_mean_term(
    causal_lm: Folder, kind: str, rank: int, count: int
) -> None:
    """Against terms written out in float64 and cut by their singular values; few and many users, and a wide rank."""
    lora = policy_of(causal_lm, kind).add_lora(rank, 8, None)
    random = torch.Generator().manual_seed(1)
    adapters = lora.start(0) + 0.1 * torch.randn(count, lora.num_parameters, generator=random)
    weight = torch.rand(count, generator=random)
    found, terms = lora.matrices(lora.mean(adapters, weight)), lora.matrices(adapters.double())
    for a, b, mean_a, mean_b in zip(terms[::2], terms[1::2], found[::2], found[1::2], strict=True):
        x, size, y = torch.linalg.svd(torch.einsum("u,uor,uri->oi", weight.double(), b, a), full_matrices=False)
        expected = x[:, :rank] * size[:rank] @ y[:rank]
        torch.testing.assert_close((mean_b @ mean_a).double(), expected, atol=1e-5, rtol=1e-5)
    once = lora.mean(adapters[:1].expand(count, -1), torch.full((count,), 1 / count))
    for one, two in zip(product(lora, once), product(lora, adapters[0]), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    nothing = lora.mean(lora.start(0).expand(count, -1), weight)
    assert all(not term.any() for term in product(lora, nothing)) and nothing.any(), "zero, and fit to be trained on"


def product(lora: LoRA, adapter: torch.Tensor) -> list[torch.Tensor]:
    matrices = lora.matrices(adapter)
    return [b @ a for a, b in zip(matrices[::2], matrices[1::2], strict=True)]


@KINDS
def test_peft_reads_what_we_write_and_we_read_it_back(causal_lm: Folder, kind: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = policy_of(causal_lm, kind)
    adapter = adapters_of(policy, 1)
    assert policy.lora is not None
    policy.lora.save([adapter[0]], tmp_path, str(causal_lm(kind)))
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(causal_lm(kind)), tmp_path).eval()
    read = tokens(policy, CHOSEN)
    with torch.no_grad(), policy.adapted(adapter):
        ours = policy.network(input_ids=read.input_ids).logits
        assert torch.allclose(peft(input_ids=read.input_ids).logits, ours, atol=1e-6)
    assert torch.equal(policy.lora.read(tmp_path), adapter[0])
    other = policy_of(causal_lm, kind).add_lora(2, 8, None)
    with pytest.raises(ValueError, match="expected an adapter of rank 2 and alpha 8, got 4 and 8"):
        other.read(tmp_path)


def test_a_network_without_the_linear_maps_is_refused(causal_lm: Folder) -> None:
    with pytest.raises(ValueError, match=r"target_modules.*got \['q_proj'\]; it has .*c_attn"):
        policy_of(causal_lm, "gpt2").add_lora(4, 8, ["q_proj"])
    for odd in ("lm_head", "c_atn"):  # the output embedding is read apart; a typo beside a name that is right
        with pytest.raises(ValueError, match=rf"got \['c_attn', '{odd}'\]; it has \['c_attn', 'c_fc', 'c_proj'\]"):
            policy_of(causal_lm, "gpt2").add_lora(4, 8, ["c_attn", odd])
    network = SimpleNamespace(get_decoder=lambda: SimpleNamespace(config=SimpleNamespace(model_type="new")))
    with pytest.raises(ValueError, match=r"model\.target_modules: no default is known for 'new', .* of \['dense'\]"):
        default_targets(network, ["dense"])


@KINDS
def test_gradient_checkpointing_sees_the_adapters_of_the_first_run(causal_lm: Folder, kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = Policy(CausalLM(str(causal_lm(kind))), checkpointing).train()
        adapters = adapters_of(policy, 1).requires_grad_()
        with policy.adapted(adapters):
            loss = total(policy, tokens(policy, CHOSEN)).sum()
        total(policy, tokens(policy, REJECTED))  # the reference, read in between without adapters
        loss.backward()
        gradients.append(adapters.grad)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5) and gradients[0].abs().max() > 0


# ---------------------------------------------------------------------- writing
@KINDS
def test_cached_writing_equals_reading_the_whole_text_again(causal_lm: Folder, kind: str) -> None:
    """Prompts of different lengths, each written on with its own adapter."""
    policy = policy_of(causal_lm, kind)
    adapters = adapters_of(policy, 3)
    texts = [policy.backbone.prompt_tokens(prompt) for prompt, _ in CHOSEN]
    writing = policy.write(adapters)
    logits = writing.start(completion_tokens([(text, []) for text in texts], left=True))
    for _ in range(4):
        token = logits.argmax(-1)
        for row, text in enumerate(texts):
            with torch.no_grad(), policy.adapted(adapters[row : row + 1]):
                whole = policy.network(input_ids=torch.tensor([text])).logits[0, -1]
            assert torch.allclose(whole, logits[row], atol=1e-5)
            text.append(int(token[row]))
        logits = writing.step(token)


@KINDS
def test_virtual_tokens_before_a_text_act_like_those_of_a_text(causal_lm: Folder, kind: str) -> None:
    """The keys and values of a real text as prefix give the log-probabilities of the two texts joined."""
    policy = policy_of(causal_lm, kind)
    begin = torch.tensor([policy.backbone.prompt_tokens("once")])
    cache = policy.network.base_model(input_ids=begin, use_cache=True).cache
    prefix = [(layer.keys.expand(2, -1, -1, -1), layer.values.expand(2, -1, -1, -1)) for layer in cache.layers]
    parts, whole = [(" upon", " a time"), (" we", " met")], [("once upon", " a time"), ("once we", " met")]
    hidden, token, row = policy.completions(tokens(policy, parts), prefix)
    ours = sequence_logps(policy.logits(hidden), token, row, 2).total
    assert torch.allclose(ours, total(policy, tokens(policy, whole)), atol=1e-5)
    writing = policy.write(prefix=prefix)
    first = writing.start(
        completion_tokens([(policy.backbone.prompt_tokens(text), []) for text, _ in parts], left=True)
    )
    joined = torch.tensor([policy.backbone.prompt_tokens("once upon")])
    with torch.no_grad():
        assert torch.allclose(first[0], policy.network(input_ids=joined).logits[0, -1], atol=1e-5)


def test_a_saved_policy_is_an_ordinary_folder(causal_lm: Folder, tmp_path: Path) -> None:
    policy = policy_of(causal_lm, "gpt2")
    for _ in range(2):  # the second time it replaces the first
        policy.save(tmp_path / "policy")
    again = Policy(CausalLM(str(tmp_path / "policy")))
    assert torch.equal(total(again, tokens(again, CHOSEN)), total(policy, tokens(policy, CHOSEN)))
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
