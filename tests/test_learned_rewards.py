"""Rewards of a checkpoint in the trainers of TRL; those of `plm label` stand in its tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import plm
from plm.backbones import HFBackbone
from plm.cli import main
from plm.method import PersonalizationMethod
from plm.methods.lora_dpo import LoRADPO
from plm.methods.lore import LoRe
from plm.testing import saved, tiny_causal_lm

CHAT = [{"role": "user", "content": "tea or coffee?"}]
ROWS: list[tuple[Any, str, str | int | None]] = [
    ("what now?", "a long walk in the rain", "anna"),
    ("what now?", "a long walk in the rain", "ben"),
    ("what now?", "sleep, and then coffee", 7),
    ("what now?", "sleep, and then coffee", "nobody"),
    ("what now?", "a walk", ""),
    (CHAT, "tea, of course", "anna"),
    (CHAT, "coffee, black as the night", None),
]


@pytest.fixture(scope="module")
def checkpoint(causal_lm: Callable[[str], Path]) -> Iterator[Path]:
    """A method whose encoder reads the prompt before the response."""
    torch.manual_seed(0)
    method = LoRe(3, 16, backbone=HFBackbone(str(causal_lm("llama")), template="plain").spec(), num_bases=3)
    method.user_ids = ["anna", "ben", "7"]
    method.weights.normal_()
    method.bases.data.normal_()
    with saved(method) as path:
        yield path


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_rewards_are_those_of_plm_score(checkpoint: Path, tmp_path: Path) -> None:
    """As the trainers call it: prompts that are messages have completions that are messages."""
    rows = [{"prompt": prompt, "response": text, "user_id": user} for prompt, text, user in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "scores.jsonl"
    command = ["score", "--ckpt_path", checkpoint, "--responses", tmp_path / "rows.jsonl", "--output", output]
    assert main(list(map(str, command))) == 0
    expected = [json.loads(line)["reward"] for line in output.read_text().splitlines()]
    reward, logged = plm.reward_func(checkpoint), []
    found = reward(
        prompts=[prompt for prompt, *_ in ROWS],
        completions=[text if isinstance(prompt, str) else reply(text) for prompt, text, _ in ROWS],
        completion_ids=[[1]] * len(ROWS),
        user_id=[user for *_, user in ROWS],
        trainer_state=None,
        log_extra=print,
        log_metric=lambda *entry: logged.append(entry),
    )
    assert found == expected and len(set(expected)) == len(ROWS)
    assert logged == [("user_known", pytest.approx(4 / 7))]
    method = plm.load_method(checkpoint)
    of_anna = method.score(["a long walk in the rain"], user_id="anna", prompts="what now?")
    of_population = method.score(["sleep, and then coffee"], prompts="what now?")
    assert found[0] == pytest.approx(float(of_anna), abs=1e-5)  # alone it is padded otherwise
    assert found[3] == pytest.approx(float(of_population), abs=1e-5)


def test_a_turn_before_the_reply_is_read_and_its_reasoning_is_not(checkpoint: Path) -> None:
    reward = plm.reward_func(checkpoint)
    turn = [*reply("wait"), {"role": "user", "content": "well?"}]
    last = {"role": "assistant", "content": "tea", "reasoning_content": "the user is thirsty"}
    (found,) = reward([CHAT], [[*turn, last]], ["ben"])
    assert [found] == reward([CHAT + turn], [reply("tea")], ["ben"])
    assert [found] != reward([CHAT], [reply("tea")], ["ben"])


@pytest.mark.parametrize("reads", ["tokens", "the response alone"])
def test_an_empty_completion_has_no_reward(reads: str, causal_lm: Callable[[str], Path]) -> None:
    """Whether or not the method could read it; the others are rewarded as if it were not there."""
    method: PersonalizationMethod
    if reads == "tokens":
        method = LoRADPO(num_users=1, feature_dim=16, backbone=tiny_causal_lm().spec(), mode="per_user")
        method.configure_model()
        with torch.no_grad():
            method.adapters.normal_()
    else:
        method = LoRe(1, 16, backbone=HFBackbone(str(causal_lm("gpt2")), template="response").spec())
        method.weights.normal_()
        method.bases.data.normal_()
    method.user_ids = ["anna"]
    with saved(method) as path:
        reward, logged = plm.reward_func(path), []
        found = reward(
            ["what now?"] * 4,
            ["", "a walk", " \n", "tea"],
            ["anna", "anna", "anna", "nobody"],
            log_metric=lambda *entry: logged.append(entry),
        )
        expected = reward(["what now?"] * 2, ["a walk", "tea"], ["anna", "nobody"])
        assert found == [None, expected[0], None, expected[1]] and None not in expected
        assert logged == [("user_known", 0.5)]
        assert reward([CHAT], [reply("")], ["anna"], log_metric=lambda *entry: logged.append(entry)) == [None]
        assert len(logged) == 1


def test_its_name_tells_checkpoints_apart(checkpoint: Path, tmp_path: Path) -> None:
    """TRL logs the rewards of each function by its name."""
    for run, kept in (("mine", "best"), ("mine", "last"), ("yours", "best")):
        path = tmp_path / run / "checkpoints" / f"{kept}.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(checkpoint.read_bytes())
        assert getattr(plm.reward_func(path), "__name__", None) == f"plm_{run}_{kept}"
    path = path.rename(tmp_path / "kept.ckpt")
    assert getattr(plm.reward_func(str(path)), "__name__", None) == f"plm_{tmp_path.name}_kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"user_id": None}, "a column user_id in the data set"),
        ({"user_id": [1.5]}, "user_id: expected a string or an integer, got 1.5"),
        ({"prompts": [CHAT], "completions": [[]]}, "ends with the assistant's text, got \\[\\]"),
        ({"completions": [{"role": "assistant", "content": "b"}]}, "ends with the assistant's text, got {'role'"),
        ({"completions": [["b"]]}, "ends with the assistant's text, got \\['b'\\]"),
        ({"prompts": [CHAT], "completions": [CHAT]}, "ends with the assistant's text, got"),
        ({"prompts": [[{"role": "user"}]], "completions": [reply("a")]}, "prompt: expected chat messages"),
    ],
)
def test_what_cannot_be_rewarded(checkpoint: Path, arguments: dict[str, Any], message: str) -> None:
    reward = plm.reward_func(checkpoint)
    with pytest.raises(ValueError, match=message):
        reward(**{"prompts": ["a"], "completions": ["b"], "user_id": ["anna"], **arguments})


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
@pytest.mark.filterwarnings("ignore")
def test_trl_trains_a_step_on_them(
    checkpoint: Path, causal_lm: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """Whatever TRL passes: the texts that were written get the rewards of the users of their rows."""
    trl = pytest.importorskip("trl", minversion="1.16", reason="needs trl >= 1.16 of the test extra (Python >= 3.11)")
    import datasets
    import transformers

    plm_reward, calls = plm.reward_func(checkpoint), []

    def recorded(**columns: Any) -> list[float | None]:
        calls.append((columns, plm_reward(**columns)))
        return calls[-1][1]

    prompts: list[Any] = [CHAT, CHAT] if kind == "GRPO" else ["tea?", "walk?"]
    rows = [{"prompt": prompt, "user_id": user} for prompt, user in zip(prompts, ["anna", "nobody"], strict=True)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(causal_lm("llama"), chat_template=TEMPLATE)
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        max_steps=1,
        logging_steps=1,
        num_generations=2,
        per_device_train_batch_size=4,
        max_completion_length=6,
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        transformers.AutoModelForCausalLM.from_pretrained(causal_lm("llama")),
        reward_funcs=recorded,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    ((columns, rewards),) = calls
    method = plm.load_method(checkpoint)
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in columns["completions"]]
    written = [json.dumps(one, separators=(",", ":")) if kind == "GRPO" else one for one in columns["prompts"]]
    assert sorted(columns["user_id"]) == ["anna", "anna", "nobody", "nobody"] and len(set(texts)) > 1
    for text, prompt, user, found in zip(texts, written, columns["user_id"], rewards, strict=True):
        known = {"user_id": user} if user == "anna" else {}
        assert found == pytest.approx(float(method.score([text], prompts=prompt, **known)), abs=1e-4)
    log = trainer.state.log_history[0]
    assert log["reward"] == pytest.approx(sum(rewards) / 4, rel=1e-5) and log["user_known"] == 0.5
