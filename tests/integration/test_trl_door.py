"""TRL's trainers with our head against the same with TRL's."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

for name in ("datasets", "peft", "trl"):
    pytest.importorskip(name, reason=f"{name} is not installed")
import datasets  # noqa: E402
import trl.trainer.utils  # noqa: E402
from compatibility import measured  # noqa: E402
from peft import LoraConfig  # noqa: E402
from test_memory import Allocations  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from trl_runs import LORA, Run, check_same, gemma2, llama, make, run  # noqa: E402

from orpo_kernels.integration.trl import accelerate, restore, use  # noqa: E402
from orpo_kernels.integration.trl.fused_head import head_on  # noqa: E402
from orpo_kernels.plan import Plan  # noqa: E402

MODELS = {"llama": llama, "gemma2": gemma2}
# By hand, those that need a setting of their own.
LOSSES: dict[str, dict[str, Any]] = {
    name: {"loss_type": name}
    for name in (
        *("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero"),
        *("apo_down", "discopop", "sft", "sigmoid_norm"),
    )
} | {name: {"loss_type": name, "label_smoothing": 0.1} for name in ("exo_pair", "robust")}
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
DPO = {f"DPO {name}": ("DPO", options) for name, options in LOSSES.items()}
DPO |= {f"DPO {name}": ("DPO", {"f_divergence_type": name}) for name in DIVERGENCES}
DPO |= {"DPO ld_alpha": ("DPO", {"ld_alpha": 0.5}), "DPO WPO": ("DPO", {"use_weighting": True})}
DPO |= {"DPO, reference beforehand": ("DPO", {"precompute_ref_log_probs": True})}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SFT": ("SFT", {}),
    "SFT dft": ("SFT", {"loss_type": "dft"}),
    "SFT, accumulation": ("SFT", {"gradient_accumulation_steps": 2}),
    "KTO": ("KTO", {}),
    "KTO apo_zero_unpaired": ("KTO", {"loss_type": "apo_zero_unpaired"}),
    "GRPO, entropy bonus": ("GRPO", {"entropy_coef": 0.05}),
    "GRPO, KL": ("GRPO", {"beta": 0.04, "num_iterations": 2}),
    "RLOO": ("RLOO", {}),
}
# All loss types in three runs: each step's loss is their sum.
_NAMES = list(LOSSES)
SUMS = {
    f"DPO losses {at + 1}": ("DPO", {"loss_type": _NAMES[at::3], "label_smoothing": 0.1, "max_steps": 5})
    for at in range(3)
}
COVERING = [
    *(
        (f"DPO losses {at + 1}", model, lora)
        for at, (model, lora) in enumerate(product(MODELS, (False, True)))
        if at < 3
    ),
    ("DPO forward_kl", "gemma2", True),
    ("DPO ld_alpha", "llama", True),
    ("DPO WPO", "gemma2", False),
    ("DPO, reference beforehand", "llama", True),
    ("SFT", "gemma2", False),
    ("SFT dft", "llama", True),
    ("KTO", "gemma2", True),
    ("GRPO, entropy bonus", "gemma2", False),
    ("GRPO, entropy bonus", "llama", True),
    ("GRPO, KL", "llama", False),
    ("RLOO", "llama", True),
]
RUNS = DPO | OTHERS | SUMS


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CI", "1")  # TRL sends no telemetry then
    datasets.disable_progress_bars()
    yield
    restore()


def lora(used: bool = True, **options: Any) -> Any:
    return LoraConfig(**LORA | {"target_modules": ["q_proj", "v_proj"]} | options) if used else None


def compare(name: str, model: str, peft: Any, folder: Path, more: dict[str, Any] | None = None) -> tuple[Run, Run]:
    """(with our head, with TRL's). more: options of `use`."""
    kind, options = RUNS[name]
    expected = run(make(kind, MODELS[model](), folder / "stock", peft=peft, **options))
    with use(**more or {}):
        trainer = make(kind, MODELS[model](), folder / "ours", peft=peft, **options)
    return run(trainer), expected


# ---- the same as TRL's ----


def same_as_stock(name: str, model: str, adapted: bool, folder: Path) -> None:
    found, expected = compare(name, model, lora(adapted), folder)
    measured(**check_same(found, expected))


@pytest.mark.shows(
    "Trainers",
    "TRL `use()`: {name}",
    "5 steps, tiny Llama or Gemma 2, with and without LoRA: losses, gradient norms, every logged metric and the first "
    "gradients against stock TRL",
)
@pytest.mark.parametrize(("name", "model", "adapted"), COVERING)
def test_five_steps(name: str, model: str, adapted: bool, tmp_path: Path):
    same_as_stock(name, model, adapted, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "model", "adapted"), list(product(DPO | OTHERS, MODELS, (False, True))))
def test_five_steps_of_all(name: str, model: str, adapted: bool, tmp_path: Path):
    same_as_stock(name, model, adapted, tmp_path)


@pytest.mark.shows("Trainers", "TRL `accelerate(trainer)`", "5 steps of DPO against stock TRL")
def test_one_trainer_that_exists(tmp_path: Path):
    expected = run(make("DPO", llama(), tmp_path / "stock"))
    trainer = make("DPO", llama(), tmp_path / "ours")
    assert accelerate(trainer) is trainer
    assert head_on(trainer.model) is not None
    assert head_on(trainer.ref_model) is not None
    measured(**check_same(run(trainer), expected))
    accelerate(trainer, plan=None)  # again: other options, the same arguments
    assert head_on(trainer.model).statistics == ("entropy", "mean_logits", "is_top1")


# ---- in and out ----


def test_use_and_restore(tmp_path: Path):
    import trl.trainer.dpo_trainer as dpo_module
    import trl.trainer.grpo_trainer as grpo_module

    stock = trl.trainer.utils.add_fused_lm_head
    places = (trl.trainer.utils, dpo_module, grpo_module)
    use()
    assert all(place.add_fused_lm_head is not stock for place in places)
    trainer = make("DPO", llama(), tmp_path)
    restore()
    assert all(place.add_fused_lm_head is stock for place in places)
    assert head_on(trainer.model) is not None  # it keeps what it was made with
    assert head_on(make("DPO", llama(), tmp_path).model) is None


def test_a_block_brings_back_what_was_before(tmp_path: Path):
    use(packing=True)
    with use():
        assert head_on(make("DPO", llama(), tmp_path).model).batches is None
    assert head_on(make("DPO", llama(), tmp_path).model).batches.name == "shared"
    with pytest.raises(KeyError), use():
        raise KeyError
    assert head_on(make("DPO", llama(), tmp_path).model).batches.name == "shared"


def test_a_trainer_without_a_fused_head_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"Other has no head of TRL's on its model: .* import ORPOTrainer"):
        accelerate(type("Other", (), {"model": llama()})())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "perhaps"}, "packing='perhaps': use 'auto', True or False"),
        ({"packing_length": 8}, "packing_length=8: use a positive int, and only with packing=True"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str):
    stock = trl.trainer.utils.add_fused_lm_head
    with pytest.raises(ValueError, match=message):
        use(**options)
    assert trl.trainer.utils.add_fused_lm_head is stock


def test_entropy_has_a_gradient_where_the_trainer_wants_it(tmp_path: Path):
    use()
    wants = {"GRPO": {"entropy_coef": 0.1}, "RLOO": {}, "DPO": {}}
    found = {kind: head_on(make(kind, llama(), tmp_path, **more).model).entropy_grad for kind, more in wants.items()}
    assert found == {"GRPO": True, "RLOO": False, "DPO": False}
    assert head_on(make("GRPO", llama(), tmp_path, use_adaptive_entropy=True).model).entropy_grad
    assert not head_on(make("GRPO", llama(), tmp_path).model).entropy_grad
    use(entropy_grad=True)
    assert head_on(make("RLOO", llama(), tmp_path).model).entropy_grad


def test_the_reference_pass_takes_one_product_and_its_plan(tmp_path: Path):
    """DPO's: as many operations as one product with the weight has, no gradient, and nothing of a logit's size."""
    vocab_size, size = 5000, 32
    plan = Plan(scratch_bytes=256 << 10)
    with use(plan=plan):
        trainer = make("DPO", llama(vocab_size=vocab_size), tmp_path, max_steps=1)
    trainer.train()  # the first call asks the model what it makes of its logits
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    scored = int(batch["completion_mask"].sum())
    flops, made = FlopCounterMode(display=False), Allocations()

    def begin(*_: Any) -> None:
        flops.__enter__()
        made.__enter__()

    def end(head: Any, inputs: Any, logits: Any) -> None:
        made.__exit__(None, None, None)
        flops.__exit__(None, None, None)
        assert not logits.requires_grad

    trainer.ref_model.lm_head.register_forward_pre_hook(begin)
    trainer.ref_model.lm_head.register_forward_hook(end)
    trainer.compute_loss(trainer.model, batch)
    assert flops.get_total_flops() == 2 * scored * size * vocab_size
    assert plan.scratch_bytes // 4 < made.scratch() <= plan.scratch_bytes < 4 * scored * vocab_size
    assert sum(buffer.nbytes for buffer in made.buffers if buffer.died is None) < 100 * batch["input_ids"].numel()


# ---- without padding, each prompt once ----


@pytest.mark.shows(
    "Trainers",
    "TRL `use(packing=True)`: {name}",
    "5 steps: losses, gradient norms, every logged metric and the first gradients against stock TRL on padded rows",
)
@pytest.mark.parametrize(
    ("name", "model", "adapted", "more"),
    [
        ("DPO sigmoid", "llama", False, {}),
        ("DPO WPO", "gemma2", True, {"packing_length": 40}),
        ("DPO sigmoid", "llama", True, {"share_prefix": False}),
        ("KTO", "llama", False, {}),
        ("GRPO, entropy bonus", "llama", False, {}),
        ("RLOO", "gemma2", True, {}),
        ("SFT", "llama", False, {}),
    ],
)
def test_rows_without_padding(name: str, model: str, adapted: bool, more: dict[str, Any], tmp_path: Path):
    found, expected = compare(name, model, lora(adapted), tmp_path, {"packing": True} | more)
    measured(**check_same(found, expected))
    head = head_on(found.trainer.accelerator.unwrap_model(found.trainer.model).get_base_model()) if adapted else None
    head = head or head_on(found.trainer.model)
    assert head.batches.gate.name == ("packed" if "share_prefix" in more else "shared")


def tokens_computed(trainer: Any) -> int:
    """What the layers of a trainer's model are given in its training steps."""
    seen = []
    layers = trainer.accelerator.unwrap_model(trainer.model).model

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            ids = kwargs.get("input_ids", args[0] if args else None)
            seen.append(ids.numel())

    layers.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    return seen[-1]


def test_a_groups_prompt_is_computed_once(tmp_path: Path):
    options = {"max_steps": 2, "num_generations": 4, "max_completion_length": 6}
    stock = tokens_computed(make("GRPO", llama(), tmp_path, **options))
    with use(packing=True):
        trainer = make("GRPO", llama(), tmp_path, **options)
    found = tokens_computed(trainer)
    inputs = trainer._buffered_inputs[0]
    prompt, completions = inputs["prompt_mask"].sum(1), inputs["completion_mask"].sum()
    assert stock == 4 * (inputs["prompt_mask"].shape[1] + inputs["completion_mask"].shape[1])
    assert found <= int(prompt[0] + completions) < stock


def test_a_model_that_cannot_have_it_trains_padded(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with use(packing=True):
        trainer = make("DPO", llama(attention_dropout=0.1), tmp_path, max_steps=1)
    run(trainer)
    assert head_on(trainer.model).batches.gate.name == "padded"
    assert "batches are padded, not shared" in caplog.text
