"""Conversations as data sets write them, as chat messages; and what two of them have in common, as the prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]
_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""Names of speakers that are not those of chat messages."""
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
TRANSCRIPT = "\n\nHuman:"
"""What a transcript begins with."""
WRITTEN = ("[{", '{"from"', TRANSCRIPT)
"""What texts begin with that hold a conversation."""


def messages_of(value: Any) -> list[Message] | None:
    r"""Chat messages of a list of them, their JSON, turns or one turn with ``from`` and ``value``, or a transcript.

    Returns:
        None for anything else.

    Example:
        >>> messages_of({"from": "gpt", "value": "Hi"}), messages_of("\n\nHuman: Hi")
        ([{'role': 'assistant', 'content': 'Hi'}], [{'role': 'user', 'content': 'Hi'}])
    """
    if isinstance(value, str) and value.startswith(TRANSCRIPT):
        return transcript(value)
    if isinstance(value, str) and value.startswith(WRITTEN):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    entries = [value] if isinstance(value, dict) and "from" in value else value
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        return None
    if all("from" in entry and "value" in entry for entry in entries):
        renamed = {"from": "role", "value": "content"}
        entries = [{renamed.get(key, key): part for key, part in entry.items()} for entry in entries]
        return [{**entry, "role": _role(entry["role"])} for entry in entries]
    return entries if all("role" in entry for entry in entries) else None


def _role(speaker: Any) -> Any:
    """The role of a speaker in chat messages."""
    return _ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker


def transcript(text: str) -> list[Message]:
    r"""Messages of a transcript; a reply that is yet to come is left out.

    Example:
        >>> transcript("\n\nHuman: Hi\n\nAssistant:")
        [{'role': 'user', 'content': 'Hi'}]
    """
    pieces = _SPEAKER.split(text)[1:]
    messages = [
        {"role": _role(speaker.lower()), "content": content.strip()}
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return messages[:-1] if messages and not messages[-1]["content"] else messages


def with_prompt(pair: dict[str, Any], has_prompt: bool) -> dict[str, Any] | None:
    """A pair whose responses are replies, and whose prompt is all that went before; None where the sides differ in it.

    Whole conversations give the prompt where there is none, or one that is the first or the last request in them. What
    fits nothing of this is left as it is, for validation to refuse.

    Args:
        pair: With ``chosen`` and ``rejected``.
        has_prompt: Whether the file has a column for the prompt.
    """
    prompt, *sides = (pair.get(name) for name in ("prompt", "chosen", "rejected"))
    if has_prompt and all(isinstance(text, str) and not text.startswith(WRITTEN) for text in (prompt, *sides)):
        return pair
    asked = messages_of(prompt)
    pair = pair if asked is None else {**pair, "prompt": asked}
    if has_prompt and any(isinstance(side, str) and side.startswith(TRANSCRIPT) for side in sides):
        return pair  # beside a prompt they are texts
    chosen, rejected = map(messages_of, sides)
    if chosen is None or rejected is None:
        return pair if has_prompt else {**pair, "prompt": ""}
    replies = {"chosen": chosen[-1:], "rejected": rejected[-1:]}
    before = chosen[:-1]
    if before != rejected[:-1]:
        return pair if has_prompt else None
    if not has_prompt:
        return {**pair, **replies, "prompt": before or ""}
    requests = [message.get("content") for message in before if message.get("role") == "user"]
    if len(before) > 1 and isinstance(prompt, str) and asked is None and prompt in (requests[:1] + requests[-1:]):
        return {**pair, **replies, "prompt": before}
    return {**pair, "chosen": chosen, "rejected": rejected}


def threads(rows: Sequence[Mapping[str, Any]]) -> list[list[Message] | None]:
    """What was said before each message of a tree; None where a message on the way is missing, or it is its own parent.

    Args:
        rows: Messages: ``message_id``, ``parent_id`` (null = the first), ``role`` and ``response``, their text.
    """
    by_id = {repr(row["message_id"]): row for row in rows}
    before: list[list[Message] | None] = []
    for row in rows:
        thread: list[Message] = []
        parent, seen = row["parent_id"], {repr(row["message_id"])}
        while repr(parent) in by_id and repr(parent) not in seen:
            seen.add(repr(parent))
            message = by_id[repr(parent)]
            thread.append({"role": _role(message["role"]), "content": message["response"]})
            parent = message["parent_id"]
        before.append(thread[::-1] if parent in (None, "") else None)
    return before
