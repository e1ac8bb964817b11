"""Preference rows: from what data sets hold to token ids.

A pair goes through three steps, each a function of its own:

1. `normalize_example` brings every accepted shape to `prompt`, `chosen`, `rejected`.
2. `tokenize_pair` tokenises prompt and completion as ONE text, as the model will see it. A tokenizer may
   merge characters across the boundary ("The answer is " + "46" may hold the token " 46"), so the prompt's
   tokens are not those of the prompt alone, and can differ between the two sides. Where the boundary falls is
   asked of the characters: the completion starts with the first token that reaches beyond the prompt's text.
   Each side therefore keeps its whole ids and the length of its prompt in them.
3. `truncate_pair` shortens a pair without ever emptying a completion. With prompts of P tokens, completions
   of C and R and maximum M, the prompt may keep max(M - max(C, R), M // 2) tokens and loses the rest from its
   start (a leading BOS token stays); then a completion that is still too long loses its end:

       P=40,  C=10,   R=5    M=32    ->  prompt 22, completions 10 and 5
       P=200, C=1000, R=500  M=1024  ->  prompt 200, completions 824 and 500
       P=900, C=1000, R=10   M=1024  ->  prompt 512, completions 512 and 10

   So the prompt gives way first, but keeps up to half of M against a long completion.

`prepare_dataset` applies them to a whole data set and returns a `DataSummary` of what happened. Rows hold
plain lists of ids, all that padded, packed and shared-prefix batches need, so a batch layout never tokenises
again.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

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
_REQUIRED_COLUMNS = TOKENIZED_COLUMNS[:4]
_SIDES = ("chosen", "rejected")

ACCEPTED_SHAPES = """accepted shapes (a message: {role, content} or {from, value}; other columns are ignored):
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


# ---- 1. shapes ----


def normalize_example(example: Mapping[str, Any]) -> dict[str, Any]:
    """Bring one row of any accepted shape to `{"prompt", "chosen", "rejected"}`.

    All three are strings if the row held strings only, else lists of `{"role", "content"}` turns: a string
    prompt becomes a user turn, a string answer an assistant turn. Where `chosen` and `rejected` are whole
    conversations, the turns they share are the prompt, and at least one turn of each is left as the
    completion; a `prompt` beside them is redundant then, and must agree with them.

    Raises:
        ValueError: the row has none of the accepted shapes; the message names its keys, their types, and the
            shapes.
    """
    try:
        prompt, chosen, rejected = _split(example)
    except _ShapeError as error:
        kinds = ", ".join(f"{key}: {_kind(value)}" for key, value in example.items())
        raise ValueError(f"{error}. The row has {{{kinds}}}; {ACCEPTED_SHAPES}") from None
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


class _ShapeError(ValueError):
    """What is wrong with a row, without the row."""


def _split(example: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected: three strings or three lists of turns."""
    prompt, chosen, rejected = (example.get(key) for key in ("prompt", *_SIDES))
    for side, value in zip(_SIDES, (chosen, rejected), strict=True):
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

    for side, turns in zip(_SIDES, answers, strict=True):
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
    # Arrow gives every message the keys of all others, filled with None; templates ask "is defined".
    turn = {key: value for key, value in turn.items() if value is not None}
    if "from" in turn and "role" not in turn:
        sender = turn.pop("from")
        if sender not in _ROLES_OF_FROM:
            known = ", ".join(_ROLES_OF_FROM)
            raise _ShapeError(f"{column!r} has a turn from {sender!r}: use one of {known}")
        turn = {"role": _ROLES_OF_FROM[sender], "content": turn.pop("value", None), **turn}
    if not isinstance(turn.get("role"), str):
        raise _ShapeError(f"{column!r} has {_kind(turn)}, which lacks a role (or from)")
    content = turn.get("content")
    if not isinstance(content, str) and "tool_calls" not in turn:
        raise _ShapeError(
            f"{column!r} has a {turn['role']!r} turn with {_kind(content)} content, not a string"
        )
    return turn


def _shared_turns(chosen: list[Turn], rejected: list[Turn]) -> list[Turn]:
    most = min(len(chosen), len(rejected)) - 1  # where all turns are equal, the last is the answer
    shared = min(_shared_length(chosen, rejected), most)
    if shared == 0:
        raise _ShapeError("'chosen' and 'rejected' are conversations that do not start with the same turn")
    return chosen[:shared]


def _shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
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


# ---- 2. tokens ----


def tokenize_pair(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None = 1024
) -> dict[str, Any]:
    """Tokenise one preference row and truncate both sides to `max_length` tokens.

    Strings: the special tokens that this tokenizer puts first (BOS, if it adds one) go before the prompt
    unless the text starts with them, and the EOS token after each completion unless it ends with it.
    Messages: the chat template owns all special tokens, the one that ends an answer included; `tools` and
    `chat_template_kwargs` columns are handed to it. An empty answer is allowed and leaves what ends it: the
    EOS token, the template's end of turn, or nothing for a tokenizer without EOS.

    Args:
        example: a row of any shape that `normalize_example` takes, or one already tokenised (it holds the
            first four of `TOKENIZED_COLUMNS`), which is only truncated.
        tokenizer: fast (boundaries from its character offsets) or slow (by comparison with the tokenised
            prompt). It is not changed.
        max_length: most tokens of prompt + completion; None keeps everything.

    Returns:
        `TOKENIZED_COLUMNS`: ids as lists of int, lengths and cuts as int.

    Raises:
        ValueError: the row's shape, `max_length` < 2, or messages without a usable chat template.
    """
    _check_max_length(max_length)
    if not isinstance(example, Mapping):
        raise ValueError(f"the row is a {type(example).__name__}, not a dict; {ACCEPTED_SHAPES}")
    row: dict[str, Any] = {}
    if all(column in example for column in _REQUIRED_COLUMNS):
        for side in _SIDES:
            row[f"{side}_input_ids"] = [int(token) for token in example[f"{side}_input_ids"]]
            row[f"{side}_prompt_length"] = int(example[f"{side}_prompt_length"])
        for column in ("prompt_cut", "chosen_cut", "rejected_cut"):
            row[column] = int(example.get(column, 0))
    else:
        pair = normalize_example(example)
        tokenize = _tokenize_text if isinstance(pair["prompt"], str) else _tokenize_chat
        for side, (ids, prompt_length) in zip(_SIDES, tokenize(pair, example, tokenizer), strict=True):
            row[f"{side}_input_ids"] = ids
            row[f"{side}_prompt_length"] = prompt_length
        row |= {"prompt_cut": 0, "chosen_cut": 0, "rejected_cut": 0}
    return truncate_pair(row, max_length, tokenizer.bos_token_id)


def _tokenize_text(
    pair: dict[str, str], example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], int]]:
    texts = [pair["prompt"] + pair[side] for side in _SIDES]
    encoded = list(_encode(texts, [len(pair["prompt"])] * 2, tokenizer))
    leading, eos = _leading_specials(texts[0], encoded[0][0], tokenizer), tokenizer.eos_token_id
    for ids, length in encoded:
        before = [] if ids[: len(leading)] == leading else leading
        ended = eos is None or (length < len(ids) and ids[-1] == eos)  # an EOS of the prompt does not count
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
    options = dict(example.get("chat_template_kwargs") or {})
    render: Callable[..., Any] = partial(
        tokenizer.apply_chat_template, tokenize=False, tools=example.get("tools") or None, **options
    )
    prompt = render(pair["prompt"], add_generation_prompt=True)
    texts = [render(pair["prompt"] + pair[side], add_generation_prompt=False) for side in _SIDES]
    boundaries = []
    for text in texts:
        boundary = _shared_length(prompt, text)
        if boundary < len(prompt):
            # Some templates open the answer otherwise than they render a given one (a thinking block, say);
            # then the prompt is what both have. But the conversation itself must be in it.
            turns = render(pair["prompt"], add_generation_prompt=False)
            if boundary < _shared_length(prompt, turns):
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
    """For each text: its ids, no special tokens added, and how many of them end within the boundary."""
    fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    for index, (text, boundary) in enumerate(zip(texts, boundaries, strict=True)):
        ids = encoded["input_ids"][index]
        if fast:
            ends = (end for _, end in encoded["offset_mapping"][index])
            length = next((token for token, end in enumerate(ends) if end > boundary), len(ids))
        else:
            prompt_ids = tokenizer(text[:boundary], add_special_tokens=False, verbose=False)["input_ids"]
            length = _prompt_length_by_text(ids, prompt_ids, tokenizer)
        yield ids, length


def _prompt_length_by_text(ids: list[int], prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of `ids` hold text of the prompt only, for tokenizers that report no offsets.

    Equal leading ids do. Where the prompt's last tokens came out otherwise in the full text, tokens still
    belong to it as long as their text, decoded, is the beginning of the prompt's.
    """
    length = _shared_length(ids, prompt_ids)
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


# ---- 3. length ----


def truncate_pair(row: Mapping[str, Any], max_length: int | None, bos_token_id: int | None) -> dict[str, Any]:
    """Return the row with both sides at most `max_length` tokens long, by the rule at the top of this module.

    Both prompts lose the same tokens, so that what they share stays shared. A side that had prompt and
    completion tokens keeps at least one of each. Cuts are added to those the row already counts.

    Raises:
        ValueError: `max_length` < 2.
    """
    _check_max_length(max_length)
    row = dict(row)
    if max_length is not None:
        cut = 0
        for side in _SIDES:
            prompt = row[f"{side}_prompt_length"]
            completion = len(row[f"{side}_input_ids"]) - prompt
            cut = max(cut, prompt - max(max_length - completion, max_length // 2))
        for side in _SIDES:
            ids, prompt = row[f"{side}_input_ids"], row[f"{side}_prompt_length"]
            kept = max(prompt - cut, min(prompt, 1))
            first = 1 if kept and ids[0] == bos_token_id else 0
            ids = ids[:first] + ids[prompt - kept + first :]
            row[f"{side}_cut"] += max(len(ids) - max_length, 0)
            row[f"{side}_input_ids"], row[f"{side}_prompt_length"] = ids[:max_length], kept
        row["prompt_cut"] += cut
    row["length"] = max(len(row[f"{side}_input_ids"]) for side in _SIDES)
    return row


def _check_max_length(max_length: int | None) -> None:
    if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
        raise ValueError(
            f"max_length={max_length!r}: use an int of at least 2 (a prompt and a completion token), or None "
            "for no truncation"
        )


# ---- data sets ----


@dataclass(frozen=True)
class DataSummary:
    """What preparing a data set did. Counts are of tokens or rows after truncation, unless named otherwise.

    Attributes:
        pairs: usable pairs.
        dropped: rows left out because neither side has a completion token to score.
        tokens: of both sides, prompts included.
        scored_tokens: completion tokens that some position predicts.
        truncated_prompts: pairs whose prompt lost tokens.
        truncated_completions: completions (two a pair) that lost tokens.
        overlong_prompts: pairs whose prompt alone was longer than `max_length`.
        padded_tokens: cells of the padded batches, in the data set's order at `batch_size` pairs each.
        max_length: the limit, None for none.
        batch_size: pairs a batch.
    """

    pairs: int
    dropped: int
    tokens: int
    scored_tokens: int
    truncated_prompts: int
    truncated_completions: int
    overlong_prompts: int
    padded_tokens: int
    max_length: int | None
    batch_size: int

    @property
    def scored_share(self) -> float:
        """Share of the tokens that are scored, from 0 to 1."""
        return self.scored_tokens / self.tokens if self.tokens else 0.0

    @property
    def padding_share(self) -> float:
        """Share of a padded batch that is padding, from 0 to 1. An estimate: training draws other batches."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    @classmethod
    def from_rows(
        cls, rows: Iterable[Mapping[str, Any]], max_length: int | None, batch_size: int
    ) -> DataSummary:
        """Count over tokenised rows, those to be dropped included."""
        count: Counter[str] = Counter()
        lengths: list[int] = []
        for row in rows:
            if not _usable(row):
                count["dropped"] += 1
                continue
            lengths.append(row["length"])
            count["tokens"] += sum(len(row[f"{side}_input_ids"]) for side in _SIDES)
            count["scored_tokens"] += _scored_tokens(row)
            count["truncated_prompts"] += row["prompt_cut"] > 0
            count["truncated_completions"] += sum(row[f"{side}_cut"] > 0 for side in _SIDES)
            if max_length is not None:
                prompt = max(row[f"{side}_prompt_length"] for side in _SIDES) + row["prompt_cut"]
                count["overlong_prompts"] += prompt > max_length
        batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
        return cls(
            pairs=len(lengths),
            dropped=count["dropped"],
            tokens=count["tokens"],
            scored_tokens=count["scored_tokens"],
            truncated_prompts=count["truncated_prompts"],
            truncated_completions=count["truncated_completions"],
            overlong_prompts=count["overlong_prompts"],
            padded_tokens=sum(2 * len(batch) * max(batch) for batch in batches),
            max_length=max_length,
            batch_size=batch_size,
        )

    def __str__(self) -> str:
        return (
            f"{self.pairs:,} pairs, {self.tokens:,} tokens, {self.scored_share:.1%} of them scored\n"
            f"max_length={self.max_length}: {self.truncated_prompts:,} of {self.pairs:,} prompts cut at "
            f"their start ({self.overlong_prompts:,} were longer by themselves), "
            f"{self.truncated_completions:,} of {2 * self.pairs:,} completions cut at their end\n"
            f"{self.dropped:,} rows dropped because no completion token was left to score\n"
            f"about {self.padding_share:.0%} padding in batches of {self.batch_size} pairs"
        )


def _scored_tokens(row: Mapping[str, Any]) -> int:
    """Completion tokens of both sides; without a prompt nothing predicts the first one."""
    return sum(
        max(len(row[f"{side}_input_ids"]) - max(int(row[f"{side}_prompt_length"]), 1), 0) for side in _SIDES
    )


def prepare_dataset(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = 1024,
    *,
    dataset_num_proc: int | None = None,
    batch_size: int = 8,
) -> tuple[Any, Any]:
    """Tokenise a data set of preference rows; each row may have any shape `tokenize_pair` takes.

    ==========================================  ======================================  ===================
    `dataset`                                   comes back as                           summary
    ==========================================  ======================================  ===================
    `datasets.Dataset`                          the same, `TOKENIZED_COLUMNS` only      `DataSummary`
    list, tuple, map-style torch `Dataset`      list of rows                            `DataSummary`
    `datasets.IterableDataset`                  the same, tokenised as it is read       None
    other iterable, torch `IterableDataset`     torch `IterableDataset`, likewise       None
    dict of name to any of these                dict with the same names                dict, same names
    ==========================================  ======================================  ===================

    Rows without a completion token to score on either side are left out, with a warning, and counted in the
    summary.

    Args:
        dataset: see the table.
        tokenizer: as for `tokenize_pair`.
        max_length: as for `tokenize_pair`.
        dataset_num_proc: processes for a `datasets.Dataset`; the others are tokenised in this one.
        batch_size: pairs a batch in the summary's estimate of padding.

    Returns:
        The prepared data set and its summary.

    Raises:
        ValueError: `max_length`, `batch_size` or a row (named by its index) cannot be used.
        TypeError: `dataset` is none of the above, or a generator, which a second epoch would find empty.
    """
    _check_max_length(max_length)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: use at least 1")
    if isinstance(dataset, Mapping):
        parts, summaries = {}, {}
        for name, part in dataset.items():
            parts[name], summaries[name] = prepare_dataset(
                part, tokenizer, max_length, dataset_num_proc=dataset_num_proc, batch_size=batch_size
            )
        return parts, summaries

    tokenize = partial(_tokenize_indexed, tokenizer=tokenizer, max_length=max_length)
    # Whoever holds one of its data sets has imported the package, so it need not be installed here.
    package = sys.modules.get("datasets")
    rows: Any
    if package is not None and isinstance(dataset, package.IterableDataset):
        rows = dataset.map(tokenize, with_indices=True).select_columns(list(TOKENIZED_COLUMNS))
        return rows.filter(_usable_or_warn), None
    if package is not None and isinstance(dataset, package.Dataset):
        rows = dataset.map(
            tokenize,
            with_indices=True,
            remove_columns=dataset.column_names,
            num_proc=dataset_num_proc,
            desc="Tokenizing preference pairs",
        )
        summary = DataSummary.from_rows(rows, max_length, batch_size)
        if summary.dropped:
            rows = rows.filter(_usable)
    elif isinstance(dataset, torch.utils.data.IterableDataset) or not _indexable(dataset):
        return _LazyPairs(dataset, tokenize), None
    else:
        rows = [tokenize(dataset[index], index) for index in range(len(dataset))]
        summary = DataSummary.from_rows(rows, max_length, batch_size)
        if summary.dropped:
            rows = list(filter(_usable, rows))
    if summary.dropped:
        warnings.warn(_left_out(f"{summary.dropped} of {summary.dropped + summary.pairs} rows"), stacklevel=2)
    return rows, summary


def _tokenize_indexed(
    example: Mapping[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> dict[str, Any]:
    try:
        return tokenize_pair(example, tokenizer, max_length)
    except ValueError as error:
        raise ValueError(f"row {index}: {error}") from error


def _indexable(dataset: Any) -> bool:
    """True for what has a length and items; False for what can be iterated over again and again."""
    kind = type(dataset).__name__
    if isinstance(dataset, Iterator):
        raise TypeError(
            f"dataset is a {kind}, which can be read only once: use a list, or a data set that can be read "
            "again"
        )
    if isinstance(dataset, (Sequence, torch.utils.data.Dataset)) and not isinstance(dataset, (str, bytes)):
        return True
    if isinstance(dataset, (str, bytes)) or not isinstance(dataset, Iterable):
        raise TypeError(f"dataset is a {kind}: use a list of dicts, a data set, or a dict of them")
    return False


def _usable(row: Mapping[str, Any]) -> bool:
    return _scored_tokens(row) > 0


def _usable_or_warn(row: Mapping[str, Any]) -> bool:
    """`_usable` for streams, which have no summary to count in."""
    if not _usable(row):
        warnings.warn(_left_out("a row of the stream"), stacklevel=2)
        return False
    return True


def _left_out(what: str) -> str:
    return f"{what} left out: neither side has a completion token to score"


class _LazyPairs(torch.utils.data.IterableDataset):
    """Tokenises the rows of an iterable as they are read."""

    def __init__(self, dataset: Iterable[Mapping[str, Any]], tokenize: Callable[..., dict[str, Any]]) -> None:
        self.dataset = dataset
        self.tokenize = tokenize

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = (self.tokenize(example, index) for index, example in enumerate(self.dataset))
        return filter(_usable_or_warn, rows)

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch on to a data set that reshuffles by it."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
