"""Which rows a step trains on and its metrics count: all of them, each once, resumed or not, in 1 and 2 processes."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from trainers import OWN, WORDS, accuracy, make, pairs, watch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.trainer_utils import get_last_checkpoint


def test_metrics_are_of_all_pairs_of_the_step(tmp_path: Path) -> None:
    """14 pairs in micro-batches of 4, fetched ahead: the last one's two must not be all that the others count."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "learning_rate": 0.0}
    trainer = make(OWN, tmp_path, pairs(14), **options)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/accuracies"] == pytest.approx(accuracy(pairs(14)))


@pytest.mark.parametrize("kind", ["trl", pytest.param("cpo", marks=pytest.mark.exhaustive)])
def test_metrics_of_the_drop_ins_are_means_of_whole_batches(kind: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "learning_rate": 0.0}
    trainer = make(kind, tmp_path, pairs(14), per_device_eval_batch_size=4, **options)
    seen = watch(trainer)
    trainer.train()
    found = trainer.state.log_history[0]
    batches = [[pairs(14)[name] for name in seen[start : start + 4]] for start in range(0, 14, 4)]
    means = [trainer.evaluate(datasets.Dataset.from_list(batch)) for batch in batches]
    for name in ("rewards/accuracies", "rewards/margins", "logps/chosen"):
        assert found[name] == pytest.approx(sum(mean[f"eval_{name}"] for mean in means) / 4, rel=1e-5), name


@pytest.mark.parametrize("kind", [OWN, "trl", "cpo"])
def test_a_second_run_counts_none_of_the_firsts_pairs(kind: str, tmp_path: Path) -> None:
    """Six steps, of which the last two are not logged."""
    trainer = make(kind, tmp_path, pairs(12), logging_steps=4, learning_rate=0.0)
    trainer.train()
    trainer.train()
    logged = [log for log in trainer.state.log_history if "rewards/margins" in log]
    fresh = make(kind, tmp_path, pairs(12), logging_steps=4, learning_rate=0.0)
    fresh.train()
    assert logged[-1]["rewards/margins"] == pytest.approx(fresh.state.log_history[0]["rewards/margins"], rel=1e-6)


def _metrics(folder: Path, rank: int, count: int, even: bool) -> None:
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    options |= {"learning_rate": 0.0, "per_device_eval_batch_size": 2, "accelerator_config": {"even_batches": even}}
    trainer = make(OWN, folder, pairs(count), **options)
    seen = watch(trainer)
    trainer.train()
    # Seven rows in batches of 2 x 2: the last holds a row twice. Uneven ones transformers cannot evaluate.
    evaluated = trainer.evaluate(pairs(7)) if even else {}
    torch.save((seen, trainer.state.log_history[0], evaluated), folder / f"{count} pairs, {rank}.pt")


# Without clipping, which would hide a factor.
GLOBAL = {"loss_normalization": "global", "train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "optim": "sgd"}


def _global(folder: Path, rank: int, accumulation: int) -> None:
    options = {"per_device_train_batch_size": 2 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = make(OWN, folder, pairs(12), **GLOBAL, **options)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    torch.save(dict(model.named_parameters()), folder / f"{accumulation} accumulated, {rank}.pt")


UNEVEN = [(14, True), (15, False)]


def _process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = "29543"
    for count, even in UNEVEN:
        _metrics(folder, rank, count, even)
    for accumulation in (1, 2):
        _global(folder, rank, accumulation)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes have found, which are started once."""
    folder = tmp_path_factory.mktemp("two processes")
    mp.spawn(_process, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize(("count", "even"), UNEVEN)
def test_metrics_of_two_processes(count: int, even: bool, of_two_processes: Path) -> None:
    """Also where the last batches of the two differ in size."""
    found = (torch.load(of_two_processes / f"{count} pairs, {rank}.pt") for rank in range(2))
    (first, logs, evaluated), (second, *_) = found
    trained = [pairs(count)[name] for name in first + second]
    assert {*first, *second} == set(range(count))
    assert even or len(trained) == count
    assert logs["rewards/accuracies"] == pytest.approx(accuracy(trained))
    assert not even or evaluated["eval_rewards/accuracies"] == pytest.approx(accuracy(pairs(7)))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_global_normalization_is_that_of_one_process(accumulation: int, of_two_processes: Path, tmp_path: Path) -> None:
    """1 x 4 pairs, and in two processes 2 x 2 and 2 x 2 x 1."""
    alone = make(OWN, tmp_path, pairs(12), per_device_train_batch_size=4, **GLOBAL)
    first = {name: parameter.detach().clone() for name, parameter in alone.model.named_parameters()}
    alone.train()
    for rank in range(2):
        found = torch.load(of_two_processes / f"{accumulation} accumulated, {rank}.pt", weights_only=False)
        for name, parameter in alone.model.named_parameters():
            change = (parameter - first[name]).norm()
            assert (parameter - found[name]).norm() <= 1e-4 * change, name


def few(chosen: Iterable[tuple[Any, ...]], *values: Iterable[Any]) -> list[Any]:
    """The product of the values, of which all but the chosen are left to the exhaustive tests."""
    listed = set(chosen)
    return [pytest.param(*one, marks=[pytest.mark.exhaustive] * (one not in listed)) for one in product(*values)]


RESUMED = [
    (OWN, "group_by_length", 12),
    ("trl", "random", 12),
    (OWN, "batch_rebalance", 18),
    ("trl", "group_by_length", 18),
]


@pytest.mark.parametrize(
    ("kind", "strategy", "at"),
    few(RESUMED, (OWN, "trl"), ("group_by_length", "random", "batch_rebalance"), (12, 18)),
)
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, strategy: str, at: int, tmp_path: Path) -> None:
    options = {"num_train_epochs": 3, "train_sampling_strategy": strategy, "save_strategy": "steps", "save_steps": at}
    whole = make(kind, tmp_path / "whole", pairs(24), **options)
    seen = watch(whole)
    whole.train()
    for epoch in range(3):
        assert Counter(seen[24 * epoch : 24 * (epoch + 1)]) == Counter(range(24))
    assert seen[:24] != seen[24:48]

    half = make(kind, tmp_path / "half", pairs(24), **options | {"save_total_limit": 1})
    half.add_callback(_Stop(at))
    half.train()
    torch.rand(7)  # what else has drawn from the global generator must not matter
    again = make(kind, tmp_path / "half", pairs(24), **options)
    rest = watch(again)
    again.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "half")))
    assert rest == seen[2 * at :]
    for (name, one), (_, other) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


STREAMS = [
    *((OWN, 3, 1, 0), (OWN, 6, 2, 2), (OWN, 8, 1, 2), (OWN, 8, 2, 0)),
    *(("trl", 3, 2, 2), ("trl", 6, 1, 0), ("trl", 8, 1, 2), ("trl", 8, 2, 0)),
]


@pytest.mark.parametrize(
    ("kind", "at", "accumulation", "workers"), few(STREAMS, (OWN, "trl"), (3, 6, 8), (1, 2), (0, 2))
)
def test_a_resumed_stream_goes_on_where_it_stopped(
    kind: str, at: int, accumulation: int, workers: int, tmp_path: Path
) -> None:
    """In the first pass, at its end, and in the second; the steps to go may be more than they were to be."""
    datasets = pytest.importorskip("datasets")
    count = 12 * accumulation
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": at, "dataloader_num_workers": workers}
    options |= {"gradient_accumulation_steps": accumulation}

    def trainer(name: str, steps: int) -> Any:
        rows = datasets.Dataset.from_list(pairs(count)).to_iterable_dataset(num_shards=3)
        return make(kind, tmp_path / name, rows.shuffle(seed=3, buffer_size=4), max_steps=steps, **options)

    whole = trainer("whole", 12)
    seen = watch(whole)
    whole.train()
    assert Counter(seen[:count]) == Counter(seen[count:]) == Counter(range(count))
    assert seen[:count] != seen[count:]
    trainer("half", at).train()
    again = trainer("half", 12)
    rest = watch(again)
    again.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "half")))
    assert rest == seen[2 * accumulation * at :]


def _Stop(at: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= at

    return Stop()


class Plain:
    """An iterable that knows nothing of workers."""

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(pairs(12))


class Sharing(IterableDataset):
    """A torch stream that gives each worker its share."""

    def __iter__(self) -> Iterator[dict[str, str]]:
        worker = get_worker_info()
        return iter(pairs(12)[worker.id :: worker.num_workers] if worker else pairs(12))


class Torch(IterableDataset):
    """A torch stream that does not."""

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(pairs(12))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stream", [Plain, Sharing, Torch])
@pytest.mark.parametrize("kind", [OWN, "trl"])
def test_every_row_of_a_stream_once(kind: str, stream: type, workers: int, tmp_path: Path) -> None:
    if kind == "trl" and stream is Plain:
        pytest.skip("TRL's trainer takes no plain iterable")
    trainer = make(kind, tmp_path, stream(), max_steps=6, dataloader_num_workers=workers)
    seen = watch(trainer)
    trainer.train()
    assert seen == list(range(12))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"logging_strategy": "no"}, id="no"),
        pytest.param({"logging_steps": 1000}, id="1000", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("kind", [OWN, "trl"])
def test_nothing_is_held_until_something_is_logged(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    counts: list[int] = []
    trainer = make(kind, tmp_path, pairs(40), **options)
    compute_loss = trainer.compute_loss

    def counted(*args: Any, **more: Any) -> Any:
        gc.collect()  # of what is not frozen
        counts.append(sum(isinstance(item, Tensor) for item in gc.get_objects()))
        return compute_loss(*args, **more)

    trainer.compute_loss = counted
    gc.freeze()
    try:
        trainer.train()
    finally:
        gc.unfreeze()
    assert max(counts[10:]) <= max(counts[4:10])


@pytest.mark.parametrize("kind", [OWN, "trl"])
def test_raw_rows_to_evaluate_and_predict(kind: str, tmp_path: Path) -> None:
    trainer = make(kind, tmp_path, pairs(4))
    rows: Any = pairs(6)
    if kind == "trl":
        datasets = pytest.importorskip("datasets")
        rows = datasets.Dataset.from_list(rows)
    metrics = trainer.evaluate(rows)
    prepared = make(kind, tmp_path, rows).train_dataset
    assert metrics["eval_loss"] == pytest.approx(trainer.evaluate(prepared)["eval_loss"])
    if kind == OWN:
        assert metrics["eval_rewards/accuracies"] == pytest.approx(accuracy(pairs(6)))
    assert trainer.evaluate({"some": rows})["eval_some_loss"] == pytest.approx(metrics["eval_loss"])
    if kind == OWN:
        assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(metrics["eval_loss"])
        with pytest.raises(ValueError, match="test_dataset, row 0: no 'rejected'"):
            trainer.predict([{"prompt": "w1", "chosen": " w2"}])


@pytest.mark.parametrize("kind", [OWN, "trl"])
def test_a_row_beyond_the_table_of_positions(kind: str, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=WORDS + 3, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    rows = [*pairs(1), {"prompt": "w1 " * 9, "chosen": " w2", "rejected": " w3"}]
    message = r"train_dataset, row 1: 1\d tokens, and the model has a table of 8 positions: use max_length=8 or less"
    with pytest.raises(ValueError, match=message):
        make(kind, tmp_path, rows, GPT2LMHeadModel(config), max_length=100)
    make(kind, tmp_path, rows, GPT2LMHeadModel(config), max_length=8).train()


@pytest.mark.parametrize("kind", [OWN, "trl"])
def test_such_a_row_to_evaluate_or_in_a_stream(kind: str, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=WORDS + 3, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    rows: Any = [*pairs(1), {"prompt": "w1 " * 9, "chosen": " w2", "rejected": " w3"}]
    trainer = make(kind, tmp_path, pairs(2), GPT2LMHeadModel(config), max_length=100)
    if kind == "trl":
        rows = pytest.importorskip("datasets").Dataset.from_list(rows)
    message = r"row 1: 1\d tokens, and the model has a table of 8 positions: use max_length=8 or less"
    with pytest.raises(ValueError, match=f"eval_dataset, {message}"):
        trainer.evaluate(rows)
    with pytest.raises(ValueError, match=rf"eval_dataset\['b'\], {message}"):
        trainer.evaluate({"b": rows})
    with pytest.raises(ValueError, match=f"test_dataset, {message}"):
        trainer.predict(rows)
    trainer = make(kind, tmp_path, Long(), GPT2LMHeadModel(config), max_length=100, max_steps=1)
    with pytest.raises(ValueError, match=r"train_dataset, row 1: 1\d tokens, and the model has a table of 8 positions"):
        trainer.train()


class Long(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter([*pairs(1), {"prompt": "w1 " * 9, "chosen": " w2", "rejected": " w3"}])


@pytest.mark.parametrize("name", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_take_positions_of_the_table(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    rows = [{"prompt": "w1 w1", "chosen": " w2 w2", "rejected": " w3"}]

    def trainer(positions: int) -> Any:
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=WORDS + 3, n_embd=16, n_layer=1, n_head=2, n_positions=positions)
        prompt = getattr(peft, name)(num_virtual_tokens=5, task_type="CAUSAL_LM")
        return make(OWN, tmp_path, rows, peft.get_peft_model(GPT2LMHeadModel(config), prompt))

    length = max(row["length"] for row in trainer(64).train_dataset)
    message = rf"{length} tokens, .* {length + 4} positions, 5 of them for PEFT's virtual tokens: use max_length"
    with pytest.raises(ValueError, match=f"{message}={length - 1} or less"):
        trainer(length + 4)
    trainer(length + 5).train()
