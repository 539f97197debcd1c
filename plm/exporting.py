"""Write models of users for other software: one of them, or the adapters of all beside each other."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import torch
from safetensors.torch import load_file, save

from plm.atomic import whole_file, write_text
from plm.backbones import CausalLM
from plm.method import PersonalizationMethod
from plm.method.abilities import Exporter, Writer
from plm.types import UserState

SERVED_RANK = 16
"""The largest rank that vLLM serves unless it is told another."""
MODULES = "lora_modules.txt"
"""File with a line NAME=FOLDER for every adapter."""
_SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_LONGEST = 100
_SERVING = """
Served for many users at once, by vLLM or by SGLang; a request names its user as `model`:

```bash
vllm serve {base} --enable-lora --max-lora-rank {rank} --max-loras 8 --lora-modules {modules}
python -m sglang.launch_server --model-path {base} --max-lora-rank {rank} --max-loras-per-batch 8 --lora-paths {modules}
```
"""
_CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [plm, {kind}]
---

# {title}

What plm has learned of the preferences of {whom}, over `{base}`: {kind}{size}. {prompts}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {folder!r})
```
{serving}"""
_PROMPTS = {
    "chat": "It was trained on conversations in the chat template of the tokenizer.",
    "plain": "It was trained on prompts and responses joined as they stand, without a chat template.",
}


class Adapter(NamedTuple):
    """A PEFT folder."""

    kind: str
    rank: int | None
    """None of a prefix."""


def export_user(method: Exporter, folder: Path, user: UserState, dtype: torch.dtype) -> None:
    """Write the model of one user into a folder; beside an adapter a card and the tokenizer.

    Args:
        method: A method of ``load_method``.
        folder: New or empty.
        user: The state of the user.
        dtype: Precision of an adapter; other models are written as they are.
    """
    method.export(folder, user)
    adapter = _finished(folder, dtype)
    if adapter is None and dtype != torch.float32:
        warnings.warn(f"a dtype is of adapters alone: {folder} holds the model in its own precision", stacklevel=2)
    if adapter is not None:
        lm = _language_model(method)
        _warn_of_rank(adapter)
        write_text(folder / "README.md", _card(lm, adapter, "one user", folder.name, f"{folder.name}={folder}"))
        lm.tokenizer.save_pretrained(str(folder))


def export_users(
    method: PersonalizationMethod, folder: Path, dtype: torch.dtype, on_progress: Callable[[int], None] | None = None
) -> int:
    """Write the adapters of all users into folders of their own, over one network that is loaded once.

    Beside them stand a card, the tokenizer, and two lists: ``users.json``, user id -> folder, and ``lora_modules.txt``
    for servers. A folder is named by the percent-encoded id, a long one by a hash.

    Args:
        method: A method of ``load_method``.
        folder: New or empty.
        dtype: Precision of the adapters.
        on_progress: Called with the number of users written since the last call.

    Returns:
        How many users.

    Raises:
        ValueError: If there are none, or the method gives them no adapters of their own.
    """
    users = method.known_users.store.ids
    if not users:
        raise ValueError("--all: expected users beside the checkpoint, got none; run plm adapt, or leave --all out")
    if not (isinstance(method, Exporter) and isinstance(method, Writer)) or not method.known_users(users[:1]).tensors:
        raise ValueError(
            f"--all: {type(method).__name__} has no adapters of its users here; name one by --user, or leave both out"
        )
    names = {user: folder_name(user) for user in users}
    adapter = None
    for user, name in names.items():
        method.export(folder / name, method.known_users([user]))
        adapter = _finished(folder / name, dtype)
        if on_progress is not None:
            on_progress(1)
    assert adapter is not None
    lm = _language_model(method)
    _warn_of_rank(adapter)
    write_text(folder / "users.json", json.dumps(names, ensure_ascii=False, indent=1))
    write_text(folder / MODULES, "".join(f"{name}={folder.absolute() / name}\n" for name in names.values()))
    whom, modules = f"{len(names)} users", f"$(cat {folder / MODULES})"
    write_text(folder / "README.md", _card(lm, adapter, whom, f"{folder.name}/{names[users[0]]}", modules))
    lm.tokenizer.save_pretrained(str(folder))
    return len(names)


def folder_name(user: str) -> str:
    """A name of a folder that stands for a user id, whatever characters that holds; no two ids share one.

    >>> folder_name("a/b"), folder_name("..")
    ('a%2Fb', '%2E%2E')
    """
    name = quote(user, safe="", errors="surrogatepass")
    if not name.strip("."):
        name = name.replace(".", "%2E")
    if len(name) <= _LONGEST:
        return name
    return f"{name[:32]}%{hashlib.sha256(user.encode(errors='surrogatepass')).hexdigest()}"


def _finished(folder: Path, dtype: torch.dtype) -> Adapter | None:
    """Bring an adapter to its precision; None for another model."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    weights = folder / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(weights).items()}
    with whole_file(weights) as part:
        part.write(save(tensors))
    return Adapter(config["peft_type"].lower().replace("_", "-"), config.get("r"))


def _language_model(method: Exporter) -> CausalLM:
    """What the adapters belong to."""
    assert isinstance(method, Writer)
    return method.policy.backbone


def _warn_of_rank(adapter: Adapter) -> None:
    """Warn of adapters that vLLM refuses unless it is told."""
    if adapter.rank is not None and adapter.rank > SERVED_RANK:
        warnings.warn(
            f"adapters of rank {adapter.rank}, which vLLM serves only with --max-lora-rank {_served(adapter.rank)} "
            f"(its default is {SERVED_RANK}); the sum of several adapters has their ranks together",
            stacklevel=3,
        )


def _served(rank: int) -> int:
    """The least rank that a server can be told to make room for."""
    return next((size for size in _SERVED_RANKS if size >= rank), rank)


def _card(lm: CausalLM, adapter: Adapter, whom: str, folder: str, modules: str) -> str:
    """What README.md says of adapters."""
    serving = ""
    if adapter.rank is not None:
        serving = _SERVING.format(base=lm.model, rank=_served(max(adapter.rank, SERVED_RANK)), modules=modules)
    return _CARD.format(
        base=lm.model,
        kind=adapter.kind,
        title=f"Adapters of {whom}",
        whom=whom,
        size="" if adapter.rank is None else f" of rank {adapter.rank}",
        prompts=_PROMPTS[lm.template],
        folder=folder,
        serving=serving,
    )
