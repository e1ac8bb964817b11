"""Messages that went through Arrow, text parts and JSON text, by both own and TRL's trainers' data."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from orpo_kernels.integration.data import prepare_dataset, tokenize_pair

# Prints all that it is given.
TEMPLATE = (
    "{% if style is defined %}{{ style | tojson }}{% endif %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% for key in m %}<|{{ key }}|>"
    "{{ m[key] if m[key] is string else m[key] | tojson }}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant<|content|>{% endif %}"
)


def byte_tokenizer(trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    from tokenizers.processors import ByteLevel

    backend.post_processor = ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["    return x", "def f(x):\n    return x"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


TOKENIZER = byte_tokenizer()


def answer(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def call(**arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def schema(**properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}


ROWS = [
    {
        "prompt": [{"role": "user", "content": "q"}, call(city="Ulm"), {"role": "tool", "content": "3"}],
        "chosen": answer("yes"),
        "rejected": answer("no"),
        "tools": [schema(city={"type": "string"})],
        "chat_template_kwargs": {"style": {"a": 1}},
    },
    {
        "prompt": [{"role": "user", "content": "q"}, call(day=3), {"role": "tool", "content": "4"}],
        "chosen": answer("yes"),
        "rejected": answer("no"),
        "tools": [schema(day={"type": "integer", "minimum": 1})],
        "chat_template_kwargs": {"style": {"b": 2}},
    },
]


def ids(rows: Any) -> list[Any]:
    prepared, _ = prepare_dataset(rows, TOKENIZER, None)
    return [row["chosen_input_ids"] for row in prepared]


def test_keys_that_arrow_has_added_do_not_reach_the_template() -> None:
    datasets = pytest.importorskip("datasets")
    through = datasets.Dataset.from_list(ROWS)
    assert through[0]["tools"][0]["function"]["parameters"]["properties"]["day"] is None  # or it shows nothing
    assert ids(through) == ids(ROWS)
    texts = [TOKENIZER.decode(row) for row in ids(through)]
    assert all("null" not in text and "None" not in text for text in texts)
    assert '"style"' not in texts[0]
    assert '{"a": 1}' in texts[0]


def test_the_same_in_trls_trainer(tmp_path) -> None:
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.experimental.orpo import ORPOConfig

    from orpo_kernels.integration.trl import ORPOTrainer

    config = LlamaConfig(vocab_size=400, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    args = ORPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_length=2000, disable_tqdm=True)
    rows = datasets.Dataset.from_list(ROWS)
    trainer = ORPOTrainer(LlamaForCausalLM(config), args, train_dataset=rows, processing_class=TOKENIZER)
    prompts = trainer.train_dataset["prompt"]
    assert all("null" not in prompt and "None" not in prompt for prompt in prompts)
    assert '"arguments": {"city": "Ulm"}' in prompts[0]

    broken = copy.deepcopy(TOKENIZER)
    broken.chat_template = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(ValueError, match=r"train_dataset, row 0: "):
        ORPOTrainer(LlamaForCausalLM(config), args, train_dataset=rows, processing_class=broken)


def test_text_parts_and_json_text() -> None:
    plain = ROWS[0]
    parts = [{"type": "text", "text": "q"}]
    called = copy.deepcopy(plain["prompt"][1])
    called["tool_calls"][0]["function"]["arguments"] = json.dumps({"city": "Ulm"})
    other = {
        "prompt": [{"role": "user", "content": parts}, called, plain["prompt"][2]],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "y"}, {"type": "text", "text": "es"}]}],
        "rejected": plain["rejected"],
        "tools": json.dumps(plain["tools"]),
        "chat_template_kwargs": json.dumps(plain["chat_template_kwargs"]),
    }
    assert ids([other]) == ids([plain])
    called["tool_calls"] = json.dumps(called["tool_calls"])
    assert ids([other]) == ids([plain])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": "{"}, r"'tools' is a string and no valid JSON"),
        ({"tools": '{"a": 1}'}, r"'tools' is dict: use a list of schemas"),
        ({"chat_template_kwargs": "[1]"}, r"'chat_template_kwargs' is list"),
        ({"chosen": [{"role": "assistant", "content": "", "tool_calls": "{}"}]}, r"'tool_calls'"),
        ({"chosen": [{"role": "assistant", "content": "", "tool_calls": '{"a": 1}'}]}, r"'tool_calls' is dict: use a"),
        ({"chosen": [{"role": "assistant", "content": ["text"]}]}, r"'chosen': a message's content holds str where"),
    ],
)
def test_what_cannot_be_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"dataset, row 1: .*{message}"):
        ids([ROWS[0], {**ROWS[1], **change}])


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("prompt", ["def f(x):\n", "def f(x):", "a  ", "x"])
@pytest.mark.parametrize("chosen", ["    return x", "\n    return x", "x", "   ", ""])
def test_the_boundary_is_the_texts(prompt: str, chosen: str, trim_offsets: bool) -> None:
    tokenizer = byte_tokenizer(trim_offsets)
    row = tokenize_pair({"prompt": prompt, "chosen": chosen, "rejected": "y"}, tokenizer, None)
    found, length = row["chosen_input_ids"][:-1], row["chosen_prompt_length"]  # without EOS
    assert tokenizer.decode(found) == prompt + chosen
    ends = [len(tokenizer.decode(found[: at + 1])) for at in range(len(found))]
    assert length == sum(end <= len(prompt) for end in ends)


@pytest.mark.parametrize("ending", ["<|end|>", "<|end|>\n", "<|end|> \n\n", ""])
def test_one_end_whatever_follows_it(ending: str) -> None:
    row = tokenize_pair({"prompt": "q", "chosen": f"a{ending}", "rejected": "b"}, TOKENIZER, None)
    assert row["chosen_input_ids"].count(TOKENIZER.eos_token_id) == 1


def test_errors_name_the_data_set_and_the_row() -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 17
    bad = {"prompt": "q", "chosen": "a\ud83d", "rejected": "b"}
    with pytest.raises(ValueError, match=r"eval_dataset\['x'\], row 17: half a surrogate pair, U\+D83D, is no text"):
        prepare_dataset({"x": [*rows, bad]}, TOKENIZER, None, name="eval_dataset")
    broken = copy.deepcopy(TOKENIZER)
    broken.chat_template = "{% if messages | length > 3 %}{{ raise_exception('too many turns') }}{% endif %}x"
    with pytest.raises(ValueError, match=r"train_dataset, row 17: TemplateError: too many turns"):
        prepare_dataset([*rows, ROWS[0]], broken, None, name="train_dataset")


def test_what_holds_no_rows_is_refused_at_once(tmp_path) -> None:
    pandas = pytest.importorskip("pandas")
    from orpo_kernels.integration.transformers import ORPOConfig, ORPOTrainer

    model = torch.nn.Linear(1, 1)
    args = ORPOConfig(str(tmp_path), use_cpu=True, report_to=[])

    def make(**sets: Any) -> None:
        ORPOTrainer(model, args, processing_class=TOKENIZER, **sets)

    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(TypeError, match=r"train_dataset is a dict of train, test: give one of these"):
        make(train_dataset={"train": [row], "test": [row]})
    with pytest.raises(TypeError, match=r"train_dataset is a DataFrame of pandas: use datasets\.Dataset\.from_pandas"):
        make(train_dataset=pandas.DataFrame([row]))
    with pytest.raises(ValueError, match="train_dataset is empty"):
        make(train_dataset=[])
    with pytest.raises(ValueError, match=r"eval_dataset\['a'\] is empty"):
        make(train_dataset=[row], eval_dataset={"a": []})
