"""From a preference row to token ids.

Prompt and completion are tokenised as ONE text, as the model will see it. A tokenizer may merge characters
across the boundary ("The answer is " + "46" may hold the token " 46"), so the prompt's tokens are not those of
the prompt alone, and can differ between the two sides. Where the boundary falls is asked of the characters: the
completion starts with the first token that reaches beyond the prompt's text. Each side therefore keeps its whole
ids and the length of its prompt in them.

Truncation never empties a completion. With prompts of P tokens, completions of C and R and maximum M, the prompt
may keep max(M - max(C, R), M // 2) tokens and loses the rest from its start (a leading BOS token stays); then a
completion that is still too long loses its end:

    P=40,  C=10,   R=5    M=32    ->  prompt 22, completions 10 and 5
    P=200, C=1000, R=500  M=1024  ->  prompt 200, completions 824 and 500
    P=900, C=1000, R=10   M=1024  ->  prompt 512, completions 512 and 10

So the prompt gives way first, but keeps up to half of M against a long completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ..batches import TokenizedRow
from .chat import template_options
from .formats import ACCEPTED_SHAPES, SIDES, Turn, normalize_example, refuse_images, shared_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZED_COLUMNS = (
    "chosen_input_ids",  # prompt + completion, as tokenised together
    "rejected_input_ids",
    "chosen_prompt_length",  # how many of them are prompt
    "rejected_prompt_length",
    "prompt_cut",  # tokens lost to truncation: 0 means untouched
    "chosen_cut",
    "rejected_cut",
    "length",  # of the longer side: transformers groups batches by this column
)
REQUIRED_COLUMNS = TOKENIZED_COLUMNS[:4]


def tokenize_pair(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None = 1024
) -> TokenizedRow:
    """Tokenise one preference row and truncate both sides to `max_length` tokens.

    Strings: the special tokens that this tokenizer puts first (BOS, if it adds one) go before the prompt
    unless the text starts with them, and the EOS token after each completion unless it ends with it, white space
    aside. Messages: the chat template owns all special tokens, the one that ends an answer included; `tools` and
    `chat_template_kwargs` columns, or their JSON, are handed to it without the keys that are None. An empty answer
    is allowed and leaves what ends it: the EOS token, the template's end of turn, or nothing for a tokenizer
    without EOS.

    Args:
        example: a row of any shape that `normalize_example` takes, or one already tokenised (it holds the
            first four of `TOKENIZED_COLUMNS`), which is only truncated.
        tokenizer: fast (boundaries from its character offsets) or slow (by comparison with the tokenised
            prompt). It is not changed.
        max_length: most tokens of prompt + completion; None keeps everything.

    Returns:
        `TOKENIZED_COLUMNS`: ids as lists of int, lengths and cuts as int.

    Raises:
        ValueError: the row's shape, an image in it, `max_length` < 2, or messages without a usable chat template.
    """
    check_max_length(max_length)
    if not isinstance(example, Mapping):
        raise ValueError(f"the row is a {type(example).__name__}, not a dict; {ACCEPTED_SHAPES}")
    row: dict[str, Any] = {}
    if all(column in example for column in REQUIRED_COLUMNS):
        refuse_images(example)
        for side in SIDES:
            row[f"{side}_input_ids"] = [int(token) for token in example[f"{side}_input_ids"]]
            row[f"{side}_prompt_length"] = int(example[f"{side}_prompt_length"])
        for column in ("prompt_cut", "chosen_cut", "rejected_cut"):
            row[column] = int(example.get(column, 0))
    else:
        pair = normalize_example(example)
        tokenize = _tokenize_text if isinstance(pair["prompt"], str) else _tokenize_chat
        for side, (ids, prompt_length) in zip(SIDES, tokenize(pair, example, tokenizer), strict=True):
            row[f"{side}_input_ids"] = ids
            row[f"{side}_prompt_length"] = prompt_length
        row |= {"prompt_cut": 0, "chosen_cut": 0, "rejected_cut": 0}
    return cast(TokenizedRow, truncate_pair(row, max_length, tokenizer.bos_token_id))


def _tokenize_text(
    pair: dict[str, str], example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], int]]:
    texts = [pair["prompt"] + pair[side] for side in SIDES]
    encoded = list(_encode(texts, [len(pair["prompt"])] * 2, tokenizer))
    leading, eos = _leading_specials(texts[0], encoded[0][0], tokenizer), tokenizer.eos_token_id
    for side, (ids, length) in zip(SIDES, encoded, strict=True):
        before = [] if ids[: len(leading)] == leading else leading
        # An EOS of the prompt does not count; one that a template has put before a line end does.
        last = pair[side].rstrip().endswith(tokenizer.eos_token or "\0") and eos in ids[length:]
        ended = eos is None or last or (length < len(ids) and ids[-1] == eos)
        yield before + ids + ([] if ended else [eos]), len(before) + length


def _leading_specials(text: str, plain: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that this tokenizer puts before a text (mostly [BOS] or []); `plain` are those without them."""
    if not tokenizer("")["input_ids"]:
        return []
    full = tokenizer(text, verbose=False)["input_ids"]
    if not plain:  # only special tokens came back, perhaps some that end a text
        return full[:1] if full[0] == tokenizer.bos_token_id else []
    starts = (at for at in range(len(full)) if full[at : at + len(plain)] == plain)
    return full[: next(starts, 0)]


def _tokenize_chat(
    pair: dict[str, list[Turn]], example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], int]]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the row holds messages, but this {type(tokenizer).__name__} has no chat_template: set "
            "tokenizer.chat_template (that of the model's instruct version, say), or give prompt, chosen and "
            "rejected as strings"
        )
    tools, options = template_options(example)
    render: Callable[..., Any] = partial(tokenizer.apply_chat_template, tokenize=False, tools=tools, **options)
    prompt = render(pair["prompt"], add_generation_prompt=True)
    texts = [render(pair["prompt"] + pair[side], add_generation_prompt=False) for side in SIDES]
    boundaries = []
    for text in texts:
        boundary = shared_length(prompt, text)
        if boundary < len(prompt):
            # Some templates open the answer otherwise than they render a given one (a thinking block, say);
            # then the prompt is what both have. But the conversation itself must be in it.
            turns = render(pair["prompt"], add_generation_prompt=False)
            if boundary < shared_length(prompt, turns):
                part = slice(boundary, boundary + 40)
                raise ValueError(
                    "this tokenizer's chat_template renders the prompt's turns otherwise once an answer "
                    f"follows: {text[part]!r} instead of {prompt[part]!r}, so it is unknown where the answer "
                    "starts. Use a template that only appends, or give the row as rendered strings"
                )
        boundaries.append(boundary)
    yield from _encode(texts, boundaries, tokenizer)


def _encode(
    texts: list[str], boundaries: list[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], int]]:
    """For each text: its ids, no special tokens added, and how many of them end within the boundary.

    Raises ValueError for a text that holds half of a surrogate pair, which is no character.
    """
    for text in texts:
        at = next((at for at, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
        if at is not None:
            part = text[max(at - 20, 0) : at + 20]
            raise ValueError(f"half a surrogate pair, U+{ord(text[at]):04X}, is no text: remove it from {part!r}")
    fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    for index, (text, boundary) in enumerate(zip(texts, boundaries, strict=True)):
        ids = encoded["input_ids"][index]
        spans = encoded["offset_mapping"][index] if fast else []
        # Offsets may leave white space out (`trim_offsets`): whose a token of nothing else is, they do not tell then.
        told = not text[boundary : boundary + 1].isspace() or any(start <= boundary < end for start, end in spans)
        if fast and told:
            length = next((token for token, (_, end) in enumerate(spans) if end > boundary), len(ids))
        else:
            prompt_ids = tokenizer(text[:boundary], add_special_tokens=False, verbose=False)["input_ids"]
            length = prompt_length_by_text(ids, prompt_ids, tokenizer)
        yield ids, length


def prompt_length_by_text(ids: list[int], prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of `ids` hold text of the prompt only, for tokenizers that report no offsets.

    Equal leading ids do. Where the prompt's last tokens came out otherwise in the full text, tokens still
    belong to it as long as their text, decoded, is the beginning of the prompt's.
    """
    length = shared_length(ids, prompt_ids)
    if length == len(prompt_ids):
        return length
    decode: Callable[..., Any] = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    prompt = decode(prompt_ids)
    for end in range(length + 1, len(ids) + 1):
        text = decode(ids[:end])
        if prompt.startswith(text):
            length = end
        elif len(text) > len(prompt) + 4:  # an unfinished character decodes to up to 4 marks
            break
    return length


def truncate_pair(row: Mapping[str, Any], max_length: int | None, bos_token_id: int | None) -> dict[str, Any]:
    """Return the row with both sides at most `max_length` tokens long, by the rule at the top of this module.

    Both prompts lose the same tokens, so that what they share stays shared. A side that had prompt and
    completion tokens keeps at least one of each. Cuts are added to those the row already counts.

    Raises:
        ValueError: `max_length` < 2.
    """
    check_max_length(max_length)
    row = dict(row)
    if max_length is not None:
        cut = 0
        for side in SIDES:
            prompt = row[f"{side}_prompt_length"]
            completion = len(row[f"{side}_input_ids"]) - prompt
            cut = max(cut, prompt - max(max_length - completion, max_length // 2))
        for side in SIDES:
            ids, prompt = row[f"{side}_input_ids"], row[f"{side}_prompt_length"]
            kept = max(prompt - cut, min(prompt, 1))
            first = 1 if kept and ids[0] == bos_token_id else 0
            ids = ids[:first] + ids[prompt - kept + first :]
            row[f"{side}_cut"] += max(len(ids) - max_length, 0)
            row[f"{side}_input_ids"], row[f"{side}_prompt_length"] = ids[:max_length], kept
        row["prompt_cut"] += cut
    row["length"] = max(len(row[f"{side}_input_ids"]) for side in SIDES)
    return row


def check_max_length(max_length: int | None) -> None:
    if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
        raise ValueError(
            f"max_length={max_length!r}: use an int of at least 2 (a prompt and a completion token), or None "
            "for no truncation"
        )
