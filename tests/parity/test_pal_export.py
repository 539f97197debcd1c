"""PAL without users: the exported Hugging Face model against the method, for every head, projector and pooling."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from plm.backbones import HashingBackbone, HFBackbone, modeling_reward
from plm.methods.pal import PAL
from plm.methods.pal.export import head_parts
from plm.types import PreferenceBatch

USERS, DIM, K = 3, 16, 3
WORDS = [f"w{index}" for index in range(40)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
PROMPTS = ["w1 w2 w3", "", "w9", "w4 w5 w6 w7 w8 w9 w10", "w2 w2"]
TEXTS = ["w11 w12", "w13 w14 w15 w16 w17", "w18", "w19 w20 w21", "w11 w30 w12 w31 w13 w32 w14"]


@pytest.fixture(autouse=True)
def module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the code of a model into its cache before it runs it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def save(folder: Path, name: str) -> str:
    """A tiny model with its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    ids = {"vocab_size": 44, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    size = {"hidden_size": DIM, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    long = {"max_position_embeddings": 64, "initializer_range": 0.3}
    model: Any
    if name == "bert":
        model = transformers.BertModel(transformers.BertConfig(**size, **long, **ids))
    elif name == "gpt2":
        shape = {"n_embd": DIM, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **ids))
    elif name == "t5":
        shape = {"d_model": DIM, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        model = transformers.T5Model(transformers.T5Config(**shape, decoder_start_token_id=0, **ids))
    else:
        config = transformers.LlamaConfig(**size, **long, num_key_value_heads=1, num_labels=1, **ids)
        made = {"llama": transformers.LlamaForCausalLM, "reward": transformers.LlamaForSequenceClassification}
        model = made[name](config)
    model.eval().save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({word: row for row, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    closed = "<s> $A </s>" if name in ("bert", "t5") else "<s> $A"
    inner.post_processor = processors.TemplateProcessing(single=closed, special_tokens=[("<s>", 1), ("</s>", 2)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: dict[str, str] = {}

    def folder(name: str) -> str:
        return made[name] if name in made else made.setdefault(name, save(tmp_path_factory.mktemp(name), name))

    return folder


def pal(backbone: HFBackbone | None = None, **options: Any) -> PAL:
    """Numbers everywhere that a fit could have left there."""
    torch.manual_seed(1)
    defaults: dict[str, Any] = {"num_prototypes": K, "projector": "mlp1-gelu-dropout0", "residual": "bradley_terry"}
    spec = None if backbone is None else backbone.spec()
    method = PAL(USERS, DIM, backbone=spec, **{**defaults, **options})
    method.base.data.normal_()
    method.feature_scale.fill_(1.7)
    for value in method.conditioning.buffers():
        if value.dim() and method.conditioning.kind != "none":
            value.uniform_(0.5, 1.5)
    method.prior_centre.normal_()
    method.geometry.logit_scale.data.fill_(-2.0)
    for module in method.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            for value in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                value.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return method.eval()


def with_weights(method: PAL, weights: Tensor | None, count: int) -> Any:
    users = method.population_state(count)
    if weights is not None:
        users.tensors["weights"] = weights.expand(count, -1)
    return users


# ---------------------------------------------------------------------- the head
LEARNERS = [{"user_learner": name} for name in ("Pw", "f(Pw)", "f(P)w", "|f(P)|w")]
HEADS: list[dict[str, Any]] = [
    {"head": name} for name in ("dot", "dist_squared", "dist", "dist_normalization", "dist_logistic", "angle")
] + [{"head": "angle_hinge", "loss": "hinge", "users": "table"}]
PROJECTORS = [
    {"projector": name}
    for name in (
        "identity",
        "mlp0-linear-dropout0-nobias",
        "mlp2-relu-dropout5-residual-batchnorm",
        "mlp2-gelu-dropout0-batchnorm-nobias",
        "mlp1-linear-dropout0",
    )
]
PROMPTED: list[dict[str, Any]] = [
    {"variant": "B", "head": "angle"},
    {"variant": "B", "head": "dist", "user_learner": "|f(P)|w", "user_projector": "mlp2-relu-dropout0-batchnorm"},
    {"variant": "B", "head": "angle", "dim": 5, "residual": "none"},
]


CONDITIONED = [{"conditioning": name} for name in ("none", "standardise", "whiten")]
CASES = [(options, False) for options in (*LEARNERS, *HEADS, *PROJECTORS, *PROMPTED, *CONDITIONED)]
CASES += [(options, True) for options in PROMPTED]


@pytest.mark.parametrize(("options", "prompted"), CASES, ids=str)
def test_head_gives_the_rewards_and_margins_of_the_method(options: dict[str, Any], prompted: bool) -> None:
    """For a user, a prototype and the population; variant B with prompts and, if it was trained without, without."""
    method = pal(**options)
    method.trained_on_prompts.fill_(prompted)
    chosen, rejected, prompts = torch.randn(3, 7, DIM).unbind()
    weights = torch.softmax(torch.randn(K), -1)
    alone = None if prompted or method.variant == "A" else torch.ones(1, DIM) * method.feature_scale
    for given in (weights, torch.eye(K)[1], None):
        users = with_weights(method, given, 7)
        kept = users.tensors["weights"][0]
        units = method.conditioning, method.feature_scale
        parts = head_parts(method.geometry, kept, *units, method._base_direction(), alone)
        head = modeling_reward.RewardHead(modeling_reward.RewardConfig(**parts.options), DIM).eval()
        head.load_state_dict(parts.tensors)
        asked = prompts if prompted else None
        with torch.no_grad():
            rewards = [head(side, asked) for side in (chosen, rejected)]
            expected = [method.score(side, users, prompt_features=asked) for side in (chosen, rejected)]
            batch = PreferenceBatch(
                chosen, rejected, torch.zeros(7).long(), torch.ones(7), torch.zeros(7).bool(), asked
            )
            margin = method.margin(batch, users)
        torch.testing.assert_close(torch.stack(rewards), torch.stack(expected), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rewards[0] - rewards[1], margin, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------- the folder
BACKBONES: list[tuple[str, dict[str, Any]]] = [
    ("bert", {}),
    ("bert", {"pooling": "cls", "layer": 1, "normalize": True}),
    ("bert", {"dtype": "bfloat16"}),
    ("llama", {}),
    ("llama", {"template": "response", "pooling": "mean"}),
    ("gpt2", {"max_length": 6}),
    ("reward", {}),
    ("t5", {}),
]


@pytest.mark.parametrize(("name", "options"), BACKBONES, ids=str)
def test_folder_is_a_hugging_face_model_of_the_users_rewards(
    folders: Callable[[str], str], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    """Saved, loaded by the Auto classes alone, and given texts in a padded batch: the rewards of the method."""
    backbone = HFBackbone(folders(name), **options)
    method = pal(backbone)
    texts = [backbone.render(prompt, text) for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    tokenizer: Any = None
    for given in (torch.softmax(torch.randn(K), -1), torch.eye(K)[1], None):
        folder, users = tmp_path / "out", with_weights(method, given, len(TEXTS))
        method.export(folder, users.take(torch.tensor([0])))
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert type(model) is not modeling_reward.RewardModel, "the code in the folder was not used"
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
            expected = method.score(backbone.encode(texts), users)
        assert logits.shape == (len(TEXTS), 1) and logits.dtype == torch.float32
        rough = 0.05 * float(expected.std()) if "dtype" in options else 1e-4
        torch.testing.assert_close(logits[:, 0], expected, atol=rough, rtol=1e-4)
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    assert not any(
        str(tmp_path) in file.read_text() or folders(name) in file.read_text() for file in folder.glob("*.json")
    )


def test_a_reward_that_depends_on_the_prompt_takes_two_texts(folders: Callable[[str], str], tmp_path: Path) -> None:
    backbone = HFBackbone(folders("llama"), template="response")
    method = pal(backbone, variant="B", head="angle")
    method.trained_on_prompts.fill_(True)
    asked = ["w1 w2 w3", "w4", "w9 w8", "w4 w5 w6 w7", "w2 w2"]
    users = with_weights(method, torch.tensor([0.2, 0.5, 0.3]), len(TEXTS))
    method.export(tmp_path / "out", users.take(torch.tensor([0])))
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    inputs, prompts = (tokenizer(texts, padding=True, return_tensors="pt") for texts in (TEXTS, asked))
    both = {**inputs, "prompt_input_ids": prompts["input_ids"], "prompt_attention_mask": prompts["attention_mask"]}
    with torch.no_grad():
        expected = method.score(backbone.encode(TEXTS), users, prompt_features=backbone.encode(asked))
        torch.testing.assert_close(model.eval()(**both).logits[:, 0], expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="give prompt_input_ids"):
            model(**inputs)


def test_the_code_in_the_folder_needs_torch_and_transformers_alone() -> None:
    tree = ast.parse(Path(modeling_reward.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {str(name).partition(".")[0] for name in modules} == {"__future__", "typing", "torch", "transformers"}


def test_what_cannot_be_exported_says_why() -> None:
    method = pal()
    with pytest.raises(ValueError, match="none negative, of sum one"):
        method.export_reward_model(torch.tensor([0.5, 0.6, 0.1]))
    with pytest.raises(ValueError, match="none negative, of sum one"):
        method.export_reward_model(torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="expected features of a Hugging Face model, got none"):
        method.export_reward_model()
    method.hparams["backbone"] = HashingBackbone(dim=DIM).spec()
    with pytest.raises(ValueError, match="got HashingBackbone"):
        method.export_reward_model()
