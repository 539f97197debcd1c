"""Chat templates: the tokens they give, the token that closes a reply, and what else they are told."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
import torch
import transformers

from plm.backbones import CausalLM, Policy
from plm.cli import main
from plm.generation import sample
from plm.methods.lora_dpo import LoRADPO
from plm.recipe.prompts import read_prompts
from plm.testing import saved

SPECIAL = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>", "<|header|>"]
ADDED = "<think>"
CHAT = [{"role": "user", "content": "a bird?"}]


class Template(NamedTuple):
    text: str
    closing: str | None


TEMPLATES = {
    "chatml": Template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "llama3": Template(
        "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|header|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|header|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "gemma": Template(
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
    ),
    "mistral": Template(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "thinking": Template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        "<|im_end|>",
    ),
    "words": Template(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        None,
    ),
}


@pytest.fixture(scope="module")
def chat_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Llama that always writes the closing token of its template, or nothing but y, for every template."""
    characters = ["<pad>", "<s>", "</s>", "\n", *map(chr, range(32, 127)), *SPECIAL, ADDED]
    vocabulary = {character: row for row, character in enumerate(characters)}
    config = transformers.LlamaConfig(
        vocab_size=len(characters),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=200,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    folders = {}
    for name, template in TEMPLATES.items():
        words = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
        words.decoder = tokenizers.decoders.Fuse()
        words.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            additional_special_tokens=SPECIAL,
        )
        tokenizer.add_tokens([ADDED])
        tokenizer.chat_template = template.text
        network = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
            network.model.norm.weight.fill_(1.0)
            network.model.embed_tokens.weight[:, 0] = 1.0
            network.lm_head.weight[vocabulary[template.closing or "y"], 0] = 10.0
        folders[name] = tmp_path_factory.mktemp(name)
        tokenizer.save_pretrained(folders[name])
        network.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("reply", ["wren", " an owl "])
def test_tokens_are_those_of_apply_chat_template(chat_models: dict[str, Path], name: str, reply: str) -> None:
    """Nothing before, between or after, whatever the tokenizer itself puts around a text."""
    lm = CausalLM(str(chat_models[name]), template="chat")
    prompt, response = lm.completion(json.dumps(CHAT), reply)
    render = lm.tokenizer.apply_chat_template
    whole = render([*CHAT, {"role": "assistant", "content": reply}], tokenize=True, return_dict=False)
    assert prompt + response == whole
    assert prompt == render(CHAT, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert lm.completion("a bird?", reply) == (prompt, response)


@pytest.mark.parametrize("name", TEMPLATES)
def test_writing_stops_at_the_token_that_closes_a_reply(
    chat_models: dict[str, Path], name: str, tmp_path: Path
) -> None:
    closing = TEMPLATES[name].closing
    lm = CausalLM(str(chat_models[name]), template="chat")
    expected = None if closing is None else lm.tokenizer.convert_tokens_to_ids(closing)
    assert lm.closing_token == expected and CausalLM(lm.model).closing_token is None
    policy = Policy(lm)
    assert policy.end_tokens == sorted({2, 2 if expected is None else expected})
    ((one,),) = sample(policy, ["a bird?"], max_new_tokens=5, temperature=0)
    assert one == (("yyyyy", (93,) * 5) if closing is None else ("", (expected,)))
    policy.save(tmp_path / "saved")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([lm.prompt_tokens("a bird?")])
    written = saved.generate(ids, max_new_tokens=5, do_sample=False)
    assert written.shape[1] - ids.shape[1] == len(one.token_ids), "transformers stops there too, by generation_config"


def test_a_closing_token_that_is_not_special_is_no_part_of_a_text(chat_models: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_models["chatml"])
    tokenizer.chat_template = TEMPLATES["chatml"].text.replace("<|im_end|>", ADDED)
    tokenizer.save_pretrained(tmp_path)
    network = transformers.AutoModelForCausalLM.from_pretrained(chat_models["words"])
    with torch.no_grad():
        network.lm_head.weight.zero_()
        network.lm_head.weight[tokenizer.convert_tokens_to_ids(ADDED), 0] = 10.0
    network.save_pretrained(tmp_path)
    ((one,),) = sample(Policy(CausalLM(str(tmp_path), template="chat")), ["a bird?"], max_new_tokens=5)
    assert one.text == "" and len(one.token_ids) == 1


def test_a_template_is_told_what_the_recipe_says(chat_models: dict[str, Path]) -> None:
    plain, told = (
        CausalLM(str(chat_models["thinking"]), template="chat", chat_template_kwargs=kwargs)
        for kwargs in (None, {"enable_thinking": False})
    )
    first, second = (lm.completion("a bird?", "wren") for lm in (plain, told))
    decode = plain.tokenizer.decode
    assert decode(first.response) == "<think>\n\n</think>\n\nwren<|im_end|>\n"
    assert decode(second.response) == "wren<|im_end|>\n" and [*first[0], *first[1]] == [*second[0], *second[1]]
    assert plain.key() != told.key() and "chat_template_kwargs" not in plain.key()
    assert told.spec()["init_args"]["chat_template_kwargs"] == {"enable_thinking": False}
    with pytest.raises(ValueError, match="expected no chat_template_kwargs with template 'plain'"):
        CausalLM("x", chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(ValueError, match=r"template's own, got \['add_generation_prompt', 'tokenize'\]"):
        CausalLM("x", template="chat", chat_template_kwargs={"tokenize": True, "add_generation_prompt": False})
    named = CausalLM(str(chat_models["thinking"]), template="chat", chat_template_kwargs={"model": "x", "tokenizer": 1})
    assert named.completion("a bird?", "wren") == first  # names of ours are the template's to use
    with pytest.raises(ValueError, match="append_eos to be true with template 'chat', which closes replies, got false"):
        CausalLM("x", template="chat", append_eos=False)


def test_a_chat_template_is_not_ignored_in_silence(chat_models: dict[str, Path]) -> None:
    with pytest.warns(UserWarning, match=r"has a chat template, and template='plain' joins .* set template='chat'"):
        CausalLM(str(chat_models["chatml"])).prepare([])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CausalLM(str(chat_models["chatml"]), template="chat").prepare([])


def test_chat_prompts_stay_lists(chat_models: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    """In what plm generate and plm sample write, which is read again, by the latter too, as the same prompts."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in (CHAT, "a tree?")))
    command = ["sample", "--policy", str(chat_models["chatml"]), "--template", "chat", "--prompts", str(prompts)]
    command += ["--num_samples", "2", "--max_new_tokens", "3", "--output", str(tmp_path / "out.jsonl")]
    assert main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [CHAT, "a tree?"]
    assert read_prompts(str(tmp_path / "out.jsonl"))[0].text == read_prompts(str(prompts))[0].text
    method = LoRADPO(num_users=1, feature_dim=16, backbone=CausalLM(str(chat_models["chatml"]), template="chat").spec())
    method.configure_model()
    with saved(method) as path:
        written = tmp_path / "generated.jsonl"
        assert main(["generate", "--ckpt_path", str(path), "--prompts", str(prompts), "--output", str(written)]) == 0
        assert [json.loads(line)["prompt"] for line in written.read_text().splitlines()] == [CHAT, "a tree?"]
    capsys.readouterr()
    assert main(command) == 0
    assert "0 prompts written, 2 were there already" in capsys.readouterr().out


def test_roles_that_a_template_refuses_are_named(chat_models: dict[str, Path]) -> None:
    lm = CausalLM(str(chat_models["words"]), template="chat")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    lm.tokenizer.chat_template = refusing
    prompt = json.dumps([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    with pytest.raises(ValueError, match=r"refuses messages of roles \['system', 'user'\]: no system role"):
        lm.prompt_tokens(prompt)
