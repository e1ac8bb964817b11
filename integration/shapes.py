"""The shapes of preference rows, brought to one: `prompt`, `chosen`, `rejected`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .chat import plain_turn

SIDES = ("chosen", "rejected")
# Where a row may hold an image: in columns of its own, or in the messages of these.
IMAGE_COLUMNS = ("images", "image")
MESSAGE_COLUMNS = ("prompt", "conversations", *SIDES)

ACCEPTED_SHAPES = """accepted shapes (text; a message: {role, content} or {from, value}, content a string or text parts;
other columns are ignored):
  {prompt, chosen, rejected}         strings
  {prompt, chosen, rejected}         prompt: string or messages; chosen, rejected: string, message or messages
  {chosen, rejected}                 messages; the turns both start with are the prompt
  {conversations, chosen, rejected}  conversations: messages (optional column system: string)"""

_ROLES_OF_FROM = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "tool": "tool",
}

Turn = dict[str, Any]


def normalize_example(example: Mapping[str, Any]) -> dict[str, Any]:
    """Bring one row of any accepted shape to `{"prompt", "chosen", "rejected"}`.

    All three are strings if the row held strings only, else lists of `{"role", "content"}` turns: a string
    prompt becomes a user turn, a string answer an assistant turn. Where `chosen` and `rejected` are whole
    conversations, the turns they share are the prompt, and at least one turn of each is left as the
    completion; a `prompt` beside them is redundant then, and must agree with them.

    Raises:
        ValueError: the row has none of the accepted shapes; the message names its keys, their types, and the
            shapes. Or it holds an image (`refuse_images`).
    """
    refuse_images(example)
    try:
        prompt, chosen, rejected = _split(example)
    except _ShapeError as error:
        kinds = ", ".join(f"{key}: {_kind(value)}" for key, value in example.items())
        raise ValueError(f"{error}. The row has {{{kinds}}}; {ACCEPTED_SHAPES}") from None
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def refuse_images(example: Mapping[str, Any]) -> None:
    """ValueError if the row holds an image: rows are trained on as text, which would leave it out.

    That is a value in one of `IMAGE_COLUMNS` other than None and what is empty, or a message whose content is a list
    with a part of another type than "text".
    """
    where = next((f"in its column {name!r}" for name in IMAGE_COLUMNS if _holds_something(example.get(name))), None)
    remedy = "drop the column"
    if where is None:
        kinds = ((name, kind) for name in MESSAGE_COLUMNS for kind in _part_types(example.get(name)))
        where = next((f"in {name!r}, a content part of type {kind!r}" for name, kind in kinds if kind != "text"), None)
        remedy = "give every message's content as a string"
    if where is not None:
        raise ValueError(
            f"the row has more than text {where}, and the trainers take text only: {remedy} to train without it, or, "
            "for a model that reads images, pass its inputs through lm_head.attach in a loop of your own"
        )


def _holds_something(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_something, value))
    if isinstance(value, Mapping):  # an image as {"bytes", "path"}
        return any(map(_holds_something, value.values()))
    return value is not None and not (isinstance(value, (str, bytes)) and not value)


def _part_types(messages: Any) -> Iterator[Any]:
    """The types of the parts of messages whose content is a list."""
    turns = [messages] if isinstance(messages, Mapping) else messages
    for turn in turns if isinstance(turns, (list, tuple)) else ():
        content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
        if isinstance(content, (list, tuple)):
            yield from (part["type"] for part in content if isinstance(part, Mapping) and part.get("type"))


class _ShapeError(ValueError):
    """What is wrong with a row, without the row."""


def _split(example: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected: three strings or three lists of turns."""
    prompt, chosen, rejected = (example.get(key) for key in ("prompt", *SIDES))
    for side, value in zip(SIDES, (chosen, rejected), strict=True):
        if value is None:
            raise _ShapeError(f"no {side!r} in this row")
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, chosen, rejected

    if example.get("conversations") is not None:
        if prompt is not None:
            raise _ShapeError("both 'prompt' and 'conversations' are given: remove one of them")
        prompt = _turns(example["conversations"], "conversations", role="user")
        system = example.get("system")
        if system:
            prompt = _turns(system, "system", role="system") + prompt

    answers = [_turns(chosen, "chosen", role="assistant"), _turns(rejected, "rejected", role="assistant")]
    whole = any(turn["role"] != "assistant" for turns in answers for turn in turns)
    if not whole:
        if prompt is None:
            raise _ShapeError("no 'prompt', and no turns before the answers that could be one")
        prompt_turns = _turns(prompt, "prompt", role="user")
    else:
        prompt_turns = _shared_turns(*answers)
        if isinstance(prompt, str):
            _check_redundant(prompt, prompt_turns)
        elif prompt is not None:
            prompt_turns = _turns(prompt, "prompt", role="user")
            if any(turns[: len(prompt_turns)] != prompt_turns for turns in answers):
                raise _ShapeError("the conversations 'chosen' and 'rejected' do not start with 'prompt'")
        answers = [turns[len(prompt_turns) :] for turns in answers]

    for side, turns in zip(SIDES, answers, strict=True):
        if not turns:
            raise _ShapeError(f"nothing is left of {side!r} after the prompt")
        foreign = [turn["role"] for turn in turns if turn["role"] != "assistant"]
        if foreign:
            raise _ShapeError(
                f"{side!r} has a {foreign[0]!r} turn after the prompt, which would be trained as the model's "
                "own words: let the answers differ in assistant turns only"
            )
    return prompt_turns, answers[0], answers[1]


def _turns(value: Any, column: str, role: str) -> list[Turn]:
    """The turns in `value`; a bare string is one turn of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)) or not value:
        raise _ShapeError(f"{column!r} is {_kind(value)}, not a string, a message or a list of messages")
    return [_turn(turn, column) for turn in value]


def _turn(turn: Any, column: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise _ShapeError(f"{column!r} holds {_kind(turn)} where a message should be")
    try:
        turn = plain_turn(turn)
    except ValueError as error:
        raise _ShapeError(f"{column!r}: {error}") from None
    if "from" in turn and "role" not in turn:
        sender = turn.pop("from")
        if sender not in _ROLES_OF_FROM:
            known = ", ".join(_ROLES_OF_FROM)
            raise _ShapeError(f"{column!r} has a turn from {sender!r}: use one of {known}")
        turn = plain_turn({"role": _ROLES_OF_FROM[sender], "content": turn.pop("value", None), **turn})
    if not isinstance(turn.get("role"), str):
        raise _ShapeError(f"{column!r} has {_kind(turn)}, which lacks a role (or from)")
    content = turn.get("content")
    if not isinstance(content, str) and "tool_calls" not in turn:
        raise _ShapeError(f"{column!r} has a {turn['role']!r} turn with {_kind(content)} content, not a string")
    return turn


def _shared_turns(chosen: list[Turn], rejected: list[Turn]) -> list[Turn]:
    most = min(len(chosen), len(rejected)) - 1  # where all turns are equal, the last is the answer
    shared = min(shared_length(chosen, rejected), most)
    if shared == 0:
        raise _ShapeError("'chosen' and 'rejected' are conversations that do not start with the same turn")
    return chosen[:shared]


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the longest common beginning."""
    if second[: len(first)] == first:
        return len(first)
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


def _check_redundant(prompt: str, turns: list[Turn]) -> None:
    """A string beside whole conversations is ignored, so it must not say anything that they do not."""
    wanted = " ".join(prompt.split())
    contents = [" ".join(turn["content"].split()) for turn in turns if turn.get("content")]
    if not any(wanted in content or content in wanted for content in contents):
        raise _ShapeError("'prompt' is in none of the turns that 'chosen' and 'rejected' share: remove one")


def _kind(value: Any) -> str:
    """A value's type, with the keys of messages, for error messages."""
    if isinstance(value, Mapping):
        return f"dict({', '.join(map(str, value))})"
    if isinstance(value, (list, tuple)):
        kinds = sorted({_kind(item) for item in value})
        return f"{type(value).__name__} of {' | '.join(kinds)}" if kinds else f"empty {type(value).__name__}"
    return type(value).__name__
