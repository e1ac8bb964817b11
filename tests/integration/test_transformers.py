"""The trainer that needs only transformers, against full logits and against itself."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from compatibility import measured
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orpo_kernels.integration.packing import layout
from orpo_kernels.integration.transformers import ORPOConfig, ORPOTrainer, PreferenceCollator
from orpo_kernels.loss import orpo_from_logps

WORDS = [
    "what",
    "is",
    "the",
    "colour",
    "of",
    "a",
    "sky",
    "blue",
    "green",
    "i",
    "do",
    "not",
    "know",
    "ask",
    "me",
    "again",
    "it",
    "was",
    "so",
]
PAIRS = [
    {"prompt": "what is the colour of a sky", "chosen": " blue", "rejected": " i do not know"},
    {"prompt": "what is blue", "chosen": " the colour of the sky", "rejected": " green"},
    {"prompt": "ask me", "chosen": " what is it", "rejected": " again again again again again"},
    {"prompt": "is the sky green", "chosen": " it is not so", "rejected": " it is"},
    {"prompt": "what was it", "chosen": " a colour", "rejected": " do not ask"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    # The padding token is the EOS token, as in many released models.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def config(tmp_path, **options) -> ORPOConfig:
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "packing": False,
    }
    return ORPOConfig(str(tmp_path), **{**defaults, **options})


def full_logits_loss(model: nn.Module, batch: dict[str, torch.Tensor], config: ORPOConfig) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    targets = batch["input_ids"].roll(-1, 1)
    logps = torch.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1)
    over_prompt = config.preset != "llama_factory"
    return orpo_from_logps(
        logps,
        batch["targets"],
        nll_targets=batch["nll_targets"] if over_prompt else None,
        beta=config.beta,
        preset=config.preset,
    ).loss


def losses(trainer: ORPOTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.shows("Trainers", "transformers `ORPOTrainer`, preset {preset}", "losses of its steps against full logits")
@pytest.mark.parametrize("preset", ["trl", "llama_factory", "paper"])
def test_steps_equal_full_logits(tmp_path, tokenizer, model, preset):
    reference = copy.deepcopy(model)
    args = config(tmp_path, preset=preset, lr_scheduler_type="constant", optim="adamw_torch", max_grad_norm=0.0)
    trainer = ORPOTrainer(model, args, train_dataset=PAIRS[:4], processing_class=tokenizer)
    trainer.train()

    optimizer = torch.optim.AdamW(reference.parameters(), lr=args.learning_rate, weight_decay=0.0)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    expected = []
    for _ in range(args.max_steps):
        loss = full_logits_loss(reference, batch, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    measured(losses=max(abs(a / b - 1) for a, b in zip(losses(trainer), expected, strict=True)))
    assert losses(trainer) == pytest.approx(expected, rel=1e-5)


@pytest.mark.shows("Trainers", "transformers `ORPOTrainer`, gradients", "against full logits")
def test_gradients_equal_full_logits(tmp_path, tokenizer, model):
    trainer = ORPOTrainer(model, config(tmp_path), train_dataset=PAIRS[:4], processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    loss, *_ = trainer.orpo(model, batch)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = full_logits_loss(model, batch, trainer.args)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        difference = torch.linalg.norm(found[name] - parameter.grad) / torch.linalg.norm(parameter.grad)
        measured(gradients=float(difference))
        assert difference < 1e-5, name


@pytest.mark.shows("Trainers", "transformers `ORPOTrainer`, evaluation", "the same metrics at batch sizes 4 and 1")
def test_evaluation_does_not_depend_on_the_batch_size(tmp_path, tokenizer, model):
    found = []
    for batch_size in (4, 1):
        args = config(tmp_path, per_device_eval_batch_size=batch_size)
        trainer = ORPOTrainer(
            copy.deepcopy(model), args, eval_dataset=PAIRS, train_dataset=PAIRS, processing_class=tokenizer
        )
        metrics = trainer.evaluate()
        timings = ("_per_second", "_runtime", "_time")
        found.append({name: value for name, value in metrics.items() if not name.endswith(timings)})
    names = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"}
    names |= {"logps/rejected", "logits/chosen", "logits/rejected", "nll_loss", "log_odds_ratio", "log_odds_chosen"}
    assert {f"eval_{name}" for name in (*names, "loss")} <= set(found[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-7)
    assert all(math.isfinite(value) for value in found[0].values())


@pytest.mark.shows(
    "Trainers",
    'transformers `ORPOTrainer`, accumulation, `loss_normalization="global"`',
    "1 x 4 and 4 x 1 pairs give the same step",
)
def test_global_normalization_makes_accumulation_exact(tmp_path, tokenizer, model):
    found = []
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2)):
        args = config(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            loss_normalization="global",
        )
        trainer = ORPOTrainer(copy.deepcopy(model), args, train_dataset=PAIRS[:4], processing_class=tokenizer)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        found.append([entry[name] for name in ("loss", "grad_norm") for entry in logged])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_batch_normalization_is_the_mean_of_micro_batches(tmp_path, tokenizer, model):
    args = config(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1)
    trainer = ORPOTrainer(copy.deepcopy(model), args, train_dataset=PAIRS[:4], processing_class=tokenizer)
    rows = [trainer.train_dataset[index] for index in range(4)]
    expected = [full_logits_loss(model, trainer.data_collator([row]), args).item() for row in rows]
    trainer.train()
    assert losses(trainer) == pytest.approx([sum(expected) / 4], rel=1e-5)


@pytest.mark.shows("Trainers", "transformers `ORPOTrainer`, a dict of evaluation sets", "metrics of each")
def test_a_dict_of_evaluation_sets(tmp_path, tokenizer, model):
    trainer = ORPOTrainer(
        model,
        config(tmp_path),
        train_dataset=PAIRS,
        eval_dataset={"first": PAIRS[:2], "last": PAIRS[2:]},
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_first_rewards/margins"] != metrics["eval_last_rewards/margins"]
    assert {"eval_first_loss", "eval_last_loss"} <= set(metrics)


@pytest.mark.shows(
    "Trainers", "transformers `ORPOTrainer`, resume from a checkpoint", "the resumed run's losses are the whole run's"
)
def test_resume_from_a_checkpoint(tmp_path, tokenizer, model):
    args = config(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=2)
    whole = ORPOTrainer(copy.deepcopy(model), args, train_dataset=PAIRS, processing_class=tokenizer)
    whole.train()
    resumed = ORPOTrainer(copy.deepcopy(model), args, train_dataset=PAIRS, processing_class=tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_is_off_by_default(tmp_path, tokenizer, model):
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer = ORPOTrainer(model, config(tmp_path), train_dataset=PAIRS, processing_class=tokenizer)
    assert {layer.self_attn.attention_dropout for layer in trainer.model.model.layers} == {0.0}


def test_model_init(tmp_path, tokenizer, model):
    trainer = ORPOTrainer(
        None,
        config(tmp_path, max_steps=1),
        train_dataset=PAIRS,
        processing_class=tokenizer,
        model_init=lambda: copy.deepcopy(model),
    )
    trainer.train()
    assert losses(trainer)


def test_a_model_of_model_init_is_prepared_as_a_given_one(tmp_path, tokenizer, model):
    """No dropout, in the one that trains too, and no row beyond its tables."""
    made = []

    def init() -> nn.Module:
        made.append(copy.deepcopy(model))
        for layer in made[-1].model.layers:
            layer.self_attn.attention_dropout = 0.5
        return made[-1]

    def trainer(rows: list[dict[str, str]]) -> ORPOTrainer:
        options = config(tmp_path, max_steps=1)
        return ORPOTrainer(None, options, train_dataset=rows, processing_class=tokenizer, model_init=init)

    trainer(PAIRS).train()
    assert len(made) == 2  # as transformers makes them: with the trainer, and when it trains
    assert {layer.self_attn.attention_dropout for one in made for layer in one.model.layers} == {0.0}
    small = len(tokenizer) - 1
    model.lm_head = nn.Linear(32, small, bias=False)
    last = tokenizer.convert_ids_to_tokens(small)
    with pytest.raises(ValueError, match=rf"train_dataset, row 0: token id {small}, which the head does not score"):
        trainer([{"prompt": "a sky", "chosen": f" {last}", "rejected": " it"}])


def test_a_model_that_may_not_train_its_head_costs_no_head_gradient(tmp_path, tokenizer, model):
    model.lm_head.requires_grad_(False)
    trainer = ORPOTrainer(model, config(tmp_path, max_steps=1), train_dataset=PAIRS, processing_class=tokenizer)
    trainer.train()
    assert model.lm_head.weight.grad is None


@pytest.mark.parametrize("quiet", [False, True])
def test_a_summary_comes_before_training(tmp_path, tokenizer, model, quiet, capsys):
    ORPOTrainer(model, config(tmp_path, disable_tqdm=quiet), train_dataset=PAIRS, processing_class=tokenizer)
    printed = capsys.readouterr().out
    assert (f"training data: {len(PAIRS)} pairs" in printed) == (not quiet)
    assert ("rows are padded; packing=True would compute" in printed) == (not quiet)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_normalization": "token"}, "loss_normalization='token': use 'batch' or 'global'"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"preset": "dpo"}, "preset='dpo' is unknown"),
    ],
)
def test_bad_arguments_are_refused_at_once(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_arguments_of_another_trainer_are_refused(tmp_path, model):
    with pytest.raises(TypeError, match="ORPOConfig"):
        ORPOTrainer(model, {"beta": 0.1}, train_dataset=PAIRS)


@pytest.mark.shows("Trainers", "transformers `ORPOTrainer`, images", "the error names where they are", "refused")
def test_images(tmp_path, tokenizer, model):
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}]
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    for rows, message in (
        ([PAIRS[0], PAIRS[1] | {"images": ["sky.png"]}], "row 1: .* in its column 'images'"),
        ([{"prompt": turns, **answers}], "row 0: .* in 'prompt', a content part of type 'image'"),
    ):
        with pytest.raises(ValueError, match=message):
            ORPOTrainer(model, config(tmp_path), train_dataset=rows, processing_class=tokenizer)


def layout_of(trainer: ORPOTrainer) -> str:
    trainer.train()
    assert trainer._gate is not None
    return trainer._gate.name or "padded"


def test_rows_are_packed_where_that_saves_a_tenth(model, tokenizer, tmp_path, caplog):
    """By default; the losses are those of padded rows."""
    found = {}
    for packing in ("auto", False):
        args = config(tmp_path, packing=packing, max_steps=2)
        trainer = ORPOTrainer(copy.deepcopy(model), args, train_dataset=PAIRS, processing_class=tokenizer)
        assert layout_of(trainer) == ("shared" if packing else "padded")
        found[packing] = losses(trainer)
    assert found["auto"] == pytest.approx(found[False], rel=1e-5)
    assert ORPOConfig("unused", use_cpu=True).packing == "auto"

    # Nothing to save: one token of prompt, sequences of one length.
    rows = [{"prompt": "a", "chosen": " sky is blue so it is", "rejected": " green is me so it was"}] * 4
    trainer = ORPOTrainer(model, config(tmp_path, packing="auto"), train_dataset=rows, processing_class=tokenizer)
    assert layout_of(trainer) == "padded"


def test_a_model_that_cannot_pack_is_padded_without_a_warning(tokenizer, tmp_path, caplog):
    bloom = BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2))
    with caplog.at_level("WARNING", "orpo_kernels"):
        args = config(tmp_path, packing="auto", max_steps=1)
        assert layout_of(ORPOTrainer(bloom, args, train_dataset=PAIRS, processing_class=tokenizer)) == "padded"
    assert "batches are padded" not in caplog.text
    with caplog.at_level("WARNING", "orpo_kernels"):
        args = config(tmp_path, packing=True, max_steps=1)
        layout_of(ORPOTrainer(bloom, args, train_dataset=PAIRS, processing_class=tokenizer))
    assert "batches are padded, not shared" in caplog.text


def test_a_refused_layout_is_laid_out_no_more(tokenizer, tmp_path, monkeypatch):
    bloom = BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2))
    args = config(tmp_path, packing=True, max_steps=12)
    trainer = ORPOTrainer(bloom, args, train_dataset=PAIRS, processing_class=tokenizer)
    packed, pack_pairs = [], layout.pack_pairs
    monkeypatch.setattr(layout, "pack_pairs", lambda *a, **options: packed.append(a) or pack_pairs(*a, **options))
    trainer.train()
    # The first batch, two trials of it, and the batch that accelerate has fetched by then.
    assert 1 <= len(packed) <= 4


def test_a_given_collator_and_a_stream_stay_padded(model, tokenizer, tmp_path):
    collator = PreferenceCollator(tokenizer)
    args = config(tmp_path, packing="auto", max_steps=1)
    trainer = ORPOTrainer(model, args, collator, train_dataset=PAIRS, processing_class=tokenizer)
    assert trainer.data_collator is collator
    trainer = ORPOTrainer(model, args, train_dataset=Stream(), processing_class=tokenizer)
    assert isinstance(trainer.data_collator, PreferenceCollator)
    with pytest.raises(ValueError, match="packing='maybe': use 'auto', True or False"):
        config(tmp_path, packing="maybe")


class Stream:
    def __iter__(self):
        return iter(PAIRS)


@pytest.mark.parametrize("what", ["tokenizer", "head"])
def test_tokens_that_the_model_lacks(what: str, model, tokenizer, tmp_path):
    """A tokenizer larger than the embeddings; a head smaller than them."""
    small = len(tokenizer) - 1
    if what == "tokenizer":
        model.resize_token_embeddings(small)
        message = rf"the tokenizer has {len(tokenizer)} tokens and the model {small} embeddings: call model\.resize"
    else:
        model.lm_head = nn.Linear(32, small, bias=False)
        message = rf"train_dataset, row 3: token id {small}, which the head does not score: it has {small} rows"
    last = tokenizer.convert_ids_to_tokens(small)
    data = [*PAIRS, {"prompt": "a sky", "chosen": f" {last}", "rejected": " it"}]
    with pytest.raises(ValueError, match=message):
        ORPOTrainer(model, config(tmp_path), train_dataset=data, processing_class=tokenizer)


def test_rows_in_several_processes(model, tokenizer, tmp_path):
    found = [
        ORPOTrainer(
            model, config(tmp_path, dataset_num_proc=processes), train_dataset=PAIRS, processing_class=tokenizer
        ).train_dataset
        for processes in (None, 2)
    ]
    assert found[0] == found[1]
