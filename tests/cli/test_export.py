"""`plm export`: the folder of a user, and what cannot be exported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from plm.backbones import CausalLM, HFBackbone, LoRA
from plm.checkpoint import load_method
from plm.cli import main
from plm.methods.clap import CLaP
from plm.methods.latent_dpo import LatentDPO
from plm.methods.lora_dpo import LoRADPO
from plm.methods.lore import LoRe
from plm.methods.pal import PAL
from plm.methods.palm import PALM
from plm.methods.vpl import VPL
from plm.testing import saved
from plm.types import Tokens
from tests.http_servers import Hub

TEXTS = ["A walk.", "Tea and toast, please", "no"]


@pytest.fixture(autouse=True)
def module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the code of a model into its cache before it runs it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def run_readme(folder: Path, prompt: str, response: str) -> float:
    """The reward by the code of the folder's README, as it stands there."""
    (code,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    names: dict[str, Any] = {"FOLDER": str(folder), "prompt": prompt, "response": response}
    exec(code, names)
    return float(names["reward"].detach())


@pytest.mark.parametrize(
    "options",
    [{}, {"variant": "B", "head": "angle"}, {"users": "table", "head": "dist", "partition": True}],
    ids=["A", "B", "partition"],
)
@pytest.mark.parametrize("template", ["plain", "response"])
def test_export_writes_the_reward_of_a_user_and_how_to_load_it(
    causal_lm: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    template: Any,
) -> None:
    torch.manual_seed(0)
    backbone = HFBackbone(str(causal_lm("gpt2")), template=template)
    method = PAL(2, 16, backbone=backbone.spec(), num_prototypes=3, projector="mlp1-relu-dropout0", **options)
    method.user_ids = ["anna", "ben"]
    method.logits.data.normal_()
    method.num_pairs.fill_(3)
    method.trained_on_prompts.fill_(method.variant == "B")
    with saved(method) as path:
        loaded = load_method(path)
        for name, user in (("anna", ["--user", "anna"]), ("ben", ["--user", "ben"]), (None, [])):
            folder = tmp_path / f"{name}"
            assert main(["export", "--ckpt_path", str(path), "--output", str(folder), *user]) == 0
            assert f"written to {folder}" in capsys.readouterr().out
            for text in TEXTS:
                with torch.no_grad():
                    expected = loaded.score([text], user_id=name, prompts="Tea?")
                assert run_readme(folder, "Tea?", text) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("adapter", ["lora", "prefix"])
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT hands on a prefix so
def test_export_writes_the_adapter_of_a_user_which_peft_loads(
    causal_lm: Callable[[str], Path], tmp_path: Path, adapter: Any
) -> None:
    base = str(causal_lm("llama"))
    method = LoRADPO(
        num_users=2, feature_dim=16, backbone=CausalLM(base).spec(), mode="per_user", adapter=adapter, rank=2
    )
    method.user_ids = ["anna", "ben"]
    method.configure_model()
    torch.manual_seed(0)
    method.adapters.data.add_(0.3 * torch.randn_like(method.adapters))
    ids = torch.tensor([[5, 9, 30, 12]])
    with saved(method) as path:
        for row, user in enumerate(method.user_ids):
            folder = tmp_path / user
            assert main(["export", "--ckpt_path", str(path), "--output", str(folder), "--user", user]) == 0
            model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
            writing = method.writing(method.user_states(torch.tensor([row])), [""])
            found = writing.start(Tokens(ids, ids > 0, ids < 0))
            with torch.no_grad():
                expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


IDS = ["anna", "a/b", "..", "x" * 300, "ü ü", *(f"u{row}" for row in range(15))]


def test_all_users_are_exported_over_one_network(
    causal_lm: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = str(causal_lm("gemma3_text"))
    method = LoRADPO(
        num_users=20, feature_dim=16, backbone=CausalLM(base).spec(), mode="per_user", rank=2, use_rslora=True
    )
    method.user_ids = IDS
    method.configure_model()
    torch.manual_seed(0)
    method.adapters.data.add_(0.3 * torch.randn_like(method.adapters))
    ids = torch.tensor([[5, 9, 30, 12]])
    loads: list[str] = []
    load = CausalLM.load
    monkeypatch.setattr(CausalLM, "load", lambda self: loads.append(self.model) or load(self))
    out = tmp_path / "out"
    with saved(method) as path:
        command = ["export", "--ckpt_path", str(path), "--all", "--output", str(out)]
        assert main(command) == 0
    assert "20 adapters written to" in capsys.readouterr().out
    assert loads == [base], "the network is loaded once"
    folders = json.loads((out / "users.json").read_text())
    assert list(folders) == IDS and len(set(folders.values())) == 20
    assert {entry.name for entry in out.iterdir() if entry.is_dir()} == set(folders.values())
    lines = (out / "lora_modules.txt").read_text().split()
    assert lines == [f"{name}={out / name}" for name in folders.values()]
    network = AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(network, out / folders[IDS[0]], adapter_name="0").eval()
    for row, user in enumerate(IDS):
        if row:
            model.load_adapter(out / folders[user], str(row))
        model.set_adapter(str(row))
        writing = method.writing(method.user_states(torch.tensor([row])), [""])
        found = writing.start(Tokens(ids, ids > 0, ids < 0))
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    card = (out / "README.md").read_text()
    assert "--enable-lora --max-lora-rank 16" in card and f"base_model: {base}" in card and "lora of rank 2" in card
    assert AutoTokenizer.from_pretrained(out)("hello")["input_ids"] == method.causal_lm.tokenizer("hello")["input_ids"]


def test_an_adapter_comes_with_a_card_and_a_tokenizer_and_a_warning_of_its_rank(
    causal_lm: Callable[[str], Path], tmp_path: Path
) -> None:
    """The sum of two adapters of rank 12 is one of rank 24, for which servers need room for 32."""
    base = str(causal_lm("llama"))
    method = LoRADPO(
        num_users=1, feature_dim=16, backbone=CausalLM(base).spec(), mode="shared_and_user", rank=12, alpha=12.0
    )
    method.user_ids = ["anna"]
    method.configure_model()
    out = tmp_path / "anna"
    command = ["export", "--user", "anna", "--output", str(out), "--dtype", "bfloat16"]
    with saved(method) as path, pytest.warns(UserWarning, match=r"rank 24, .* only with --max-lora-rank 32 \(its def"):
        assert main([*command, "--ckpt_path", str(path)]) == 0
    stored = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16} and len(stored) == 8
    assert "--max-lora-rank 32" in (tmp_path / "anna" / "README.md").read_text()
    assert (tmp_path / "anna" / "tokenizer.json").is_file()


def test_what_has_no_adapters_of_its_users_is_not_exported_for_all(
    causal_lm: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = CausalLM(str(causal_lm("llama"))).spec()
    shared = LoRADPO(num_users=1, feature_dim=16, backbone=spec, mode="shared", rank=2)
    shared.configure_model()
    shared.user_ids = ["anna"]
    with saved(shared) as path:
        assert main(["export", "--ckpt_path", str(path), "--all", "--output", str(tmp_path / "out")]) == 1
    assert "LoRADPO has no adapters of its users here" in capsys.readouterr().err
    assert main(["export", "--ckpt_path", "x", "--all", "--user", "anna", "--output", "y"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_what_cannot_be_exported_gets_one_message(
    causal_lm: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(method: Any, *args: str) -> str:
        with saved(method) as path:
            capsys.readouterr()
            assert main(["export", "--ckpt_path", str(path), "--output", str(tmp_path / "out"), *args]) == 1
        shown = capsys.readouterr().err
        assert "Traceback" not in shown and not (tmp_path / "out" / "config.json").exists()
        return shown

    nothing = "has nothing to export: its class has no `export(folder, user)`"
    # latents without the model that made them do not write
    for method in (VPL(2, 4), PALM(0, 4), LatentDPO(2, 8, family="vector")):
        instead = "score with plm score, or plm generate --policy MODEL --best_of N"
        assert f"{type(method).__name__} {nothing}; {instead}" in error(method)
    writes = CLaP(1, 16, CausalLM(str(causal_lm("gpt2"))).spec(), latent_dim=4, num_queries=2, encoder_layers=1)
    writes.configure_model()
    assert f"CLaP {nothing}; write with plm generate" in error(writes)
    pal = PAL(2, 4)
    pal.user_ids = ["anna", "ben"]
    assert "no user 'ana' beside" in error(pal, "--user", "ana")
    assert "expected features of a Hugging Face model, got none" in error(pal, "--user", "anna")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    assert "expected a new or an empty folder" in error(pal)
    assert main(["export", "--ckpt_path", "x", "--output", "y", "--usr", "anna"]) == 2
    assert "did you mean '--user'?" in capsys.readouterr().err


def test_an_id_is_a_name_and_never_a_path_or_a_number(
    causal_lm: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A policy of each user: written out, learned from a CSV file, listed; nothing lands elsewhere."""
    options: dict[str, Any] = {"rank": 2, "alpha": 4.0, "adapt_steps": 1}
    method = LoRADPO(
        num_users=3, feature_dim=16, backbone=CausalLM(str(causal_lm("gpt2"))).spec(), mode="per_user", **options
    )
    method.configure_model()
    method.user_ids = ["001", "../../etc/passwd", "a/b"]
    torch.manual_seed(0)
    method.adapters.data += torch.randn_like(method.adapters)
    pairs = tmp_path / "pairs.csv"
    rows = ["1,p,yes,no", "0002,p,yes,no", "0002,q,no,yes", "../x,p,yes,no"]
    pairs.write_text("\n".join(["user_id,prompt,chosen,rejected", *rows]) + "\n")
    assert isinstance(method.shape, LoRA)
    with saved(method) as path:
        for row, user_id in enumerate(method.user_ids):
            folder = tmp_path / str(row)
            assert main(["export", "--ckpt_path", str(path), "--user", user_id, "--output", str(folder)]) == 0
            assert torch.equal(method.shape.read(folder), method.adapters[row])
        before = {found for found in path.parent.rglob("*") if found.is_file()}
        assert main(["adapt", "--ckpt_path", str(path), "--pairs", str(pairs)]) == 0
        new = {found for found in path.parent.rglob("*") if found.is_file()} - before
        assert all(found.parent == path.parent and found.name.startswith("method.users.db") for found in new)
        capsys.readouterr()
        assert main(["users", "list", "--ckpt_path", str(path)]) == 0
        listed = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
        assert listed == {**dict.fromkeys(method.user_ids, "0"), "1": "1", "0002": "2", "../x": "1"}
        loaded = load_method(path)
        assert loaded.find_users is not None
        trained = loaded.find_users(["1", "0002", "../x"]).tensors["adapter"]
        assert (trained - method.fresh).abs().amax(1).min() > 0.9 * method.adapt_lr  # a step of Adam


def test_an_export_is_uploaded_to_a_repository_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the hub has got are the bytes of the folder; nobody else sees it, and nothing is computed in vain."""
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url.removesuffix("/v1"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "another")
    method = LoRe(2, 8, backbone=HFBackbone(str(tmp_path / "none")).spec(), num_bases=2)

    def write(method: LoRe, folder: Path, user: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("a card")

    monkeypatch.setattr(LoRe, "export", write)
    with saved(method) as path, hub.running():
        folder = tmp_path / "out"
        export = ["export", "--ckpt_path", str(path), "--output", str(folder), "--push_to_hub"]
        assert main([*export, "anna/taste"]) == 1 and not folder.exists() and not hub.made
        assert "log in by hf auth login, or set HF_TOKEN" in capsys.readouterr().err
        monkeypatch.setenv("HF_TOKEN", "reader")
        assert main([*export, "anna/taste"]) == 1 and not folder.exists() and not hub.made
        assert "expected a token that writes, yours only reads; make one at" in capsys.readouterr().err
        monkeypatch.setenv("HF_TOKEN", "key")
        for name in ("anna/taste/x", "taste", "anna/public"):
            assert main([*export, name]) == 1 and not folder.exists() and not hub.made
        refusals = capsys.readouterr().err
        assert refusals.count("the name of its owner, a slash and") == 2 and "everybody can read this" in refusals
        assert main([*export, "anna/taste"]) == 0
        assert "uploaded to http://127.0.0.1:" in capsys.readouterr().out
        (made,) = hub.made
        assert made["name"] == "taste" and (made.get("visibility") == "private" or made.get("private"))
        assert {"README.md": b"a card"} == {n: d for n, d in hub.files.items() if n != ".gitattributes"}
        hub.is_full = True
        export[export.index(str(folder))] = str(tmp_path / "again")
        assert main([*export, "anna/taste"]) == 1
        shown = capsys.readouterr().err
        assert "is written, but anna/taste did not take it; try hf upload --private anna/taste" in shown
        assert (tmp_path / "again" / "README.md").read_text() == "a card"
