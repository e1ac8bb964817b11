"""Each preset against the code it is named after, on random log-probs and through a Llama's full logits."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from orpo_kernels.objective import OrpoOutput, orpo_objective
from orpo_kernels.odds_ratio import odds_ratio_loss
from orpo_kernels.presets import PRESETS, Preset, get_preset

IGNORED = -100
VOCABULARY = 61
NUM_PAIRS = 3


def trl_trainer(beta: float) -> Any:
    """TRL's trainer with what its loss reads, and nothing else."""
    orpo = pytest.importorskip("trl.experimental.orpo", reason="trl is not installed")
    trainer = object.__new__(orpo.ORPOTrainer)
    trainer.beta = beta
    trainer.is_encoder_decoder = False
    trainer.aux_loss_enabled = False
    trainer.padding_value = 0
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value)
    return trainer


def load_llama_factory() -> type:
    """LLaMA-Factory's loss methods, compiled from the installed source.

    The package itself cannot be imported beside the TRL and transformers that are tested here: it asks for
    trl <= 0.24, transformers <= 5.6 and a dozen packages that no loss needs.
    """
    spec = importlib.util.find_spec("llamafactory")
    if spec is None or spec.origin is None:
        pytest.skip(
            "llamafactory is not installed, and the llama_factory preset is tested against its own source: "
            "pip install --no-deps llamafactory==0.9.5 (as `make test` does)"
        )
    train = Path(spec.origin).parent / "train"
    (trainer,) = (
        node
        for node in ast.parse((train / "dpo" / "trainer.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    )
    wanted = {
        "odds_ratio_loss",
        "compute_preference_loss",
        "concatenated_forward",
        "compute_reference_log_probs",
        "get_batch_loss_metrics",
    }
    trainer.bases = []
    trainer.body = [node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    assert {node.name for node in trainer.body if isinstance(node, ast.FunctionDef)} == wanted
    for node in trainer.body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    (get_batch_logps,) = (
        node
        for node in ast.parse((train / "trainer_utils.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "get_batch_logps"
    )
    code = compile(
        ast.Module([get_batch_logps, trainer], []),
        str(train),
        "exec",
        flags=annotations.compiler_flag,
    )
    namespace: dict[str, Any] = {"torch": torch, "F": F, "IGNORE_INDEX": IGNORED}
    exec(code, namespace)
    return namespace[trainer.name]


@pytest.fixture(scope="module")
def llama_factory_class() -> type:
    return load_llama_factory()


def llama_factory_trainer(cls: type, beta: float, pref_ftx: float = 0.0) -> Any:
    trainer = cls()
    trainer.beta = beta
    trainer.ftx_gamma = pref_ftx
    trainer.ld_alpha = None
    trainer.loss_type = "orpo"
    trainer.finetuning_args = SimpleNamespace(use_ref_model=False)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"))
    return trainer


# --- on random log-probs ------------------------------------------------------------------------------------

# Within the range in which the peers' own fp32 formulas are exact to 1e-5; test_objective.py covers the rest.
mean_logps = st.lists(st.tuples(*[st.floats(-8, -0.125, width=32)] * 2), min_size=1, max_size=6)


@given(pairs=mean_logps, beta=st.floats(0.01, 2))
@settings(deadline=None, max_examples=50)
def test_trl_odds_ratio_loss(pairs: list[tuple[float, float]], beta: float) -> None:
    chosen, rejected = torch.tensor(pairs).T
    losses, chosen_rewards, rejected_rewards, log_odds_ratio, log_odds_chosen = trl_trainer(beta).odds_ratio_loss(
        chosen, rejected
    )
    term, _ = odds_ratio_loss(chosen, rejected)
    torch.testing.assert_close(-beta * term, losses, rtol=1e-5, atol=1e-6)

    # One token a sequence makes its mean log-prob the given value.
    mask = torch.ones(2 * len(pairs), 1, dtype=torch.bool)
    output = orpo_objective(torch.cat([chosen, rejected])[:, None], mask, beta=beta)
    metrics = output.metrics()
    torch.testing.assert_close(output.loss - output.nll_loss, -losses.mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics["log_odds_ratio"], log_odds_ratio, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["log_odds_chosen"], log_odds_chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics["rewards/chosen"], chosen_rewards.mean())
    torch.testing.assert_close(metrics["rewards/rejected"], rejected_rewards.mean())


@given(pairs=mean_logps, beta=st.floats(0.01, 2))
@settings(deadline=None, max_examples=50)
def test_llama_factory_odds_ratio_loss(
    llama_factory_class: type, pairs: list[tuple[float, float]], beta: float
) -> None:
    chosen, rejected = torch.tensor(pairs).T
    expected = llama_factory_trainer(llama_factory_class, beta).odds_ratio_loss(chosen, rejected)
    mask = torch.ones(2 * len(pairs), 1, dtype=torch.bool)
    output = orpo_objective(torch.cat([chosen, rejected])[:, None], mask, beta=beta, preset="llama_factory")
    torch.testing.assert_close(output.loss, expected.mean(), rtol=1e-5, atol=1e-6)


# --- through a Llama's full logits --------------------------------------------------------------------------


@dataclasses.dataclass
class PairBatch:
    """Padded on the right, chosen rows first."""

    input_ids: Tensor  # [2B, T]
    attention_mask: Tensor  # [2B, T]
    labels: Tensor  # [2B, T], IGNORED in prompts and padding


def make_pair_batch() -> PairBatch:
    generator = torch.Generator().manual_seed(1)
    prompts, chosen, rejected = (4, 2, 7), (3, 9, 1), (6, 2, 5)
    length = 17
    batch = PairBatch(
        torch.zeros(2 * NUM_PAIRS, length, dtype=torch.int64),
        torch.zeros(2 * NUM_PAIRS, length, dtype=torch.int64),
        torch.full((2 * NUM_PAIRS, length), IGNORED),
    )
    for row, completion in enumerate(chosen + rejected):
        prompt = prompts[row % NUM_PAIRS]
        end = prompt + completion
        batch.input_ids[row, :end] = torch.randint(VOCABULARY, (end,), generator=generator)
        batch.input_ids[row, :prompt] = torch.arange(prompt) + row % NUM_PAIRS
        batch.attention_mask[row, :end] = 1
        batch.labels[row, prompt:end] = batch.input_ids[row, prompt:end]
    return batch


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def ours_through_full_logits(
    llama: LlamaForCausalLM, batch: PairBatch, preset: str | Preset, beta: float | None = None
) -> tuple[OrpoOutput, Tensor]:
    """The output and the logits [2B, T, V]."""
    logits = llama(batch.input_ids, attention_mask=batch.attention_mask).logits
    targets = batch.input_ids[:, 1:]
    logps = logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    nll_mask = None
    if get_preset(preset).nll_over == "prompt+chosen":
        nll_mask = batch.attention_mask[:NUM_PAIRS, 1:].bool()
    return (
        orpo_objective(logps, batch.labels[:, 1:] != IGNORED, None, nll_mask, beta=beta, preset=preset),
        logits.detach(),
    )


def gradients(llama: LlamaForCausalLM, loss: Tensor) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(llama.parameters()))])


def assert_gradients_agree(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("beta", [None, 0.7])
def test_trl_preset_equals_trl_on_a_llama(llama: LlamaForCausalLM, beta: float | None) -> None:
    batch = make_pair_batch()
    peer_batch = {
        f"{side}_{name}": getattr(batch, name)[rows]
        for side, rows in (("chosen", slice(0, NUM_PAIRS)), ("rejected", slice(NUM_PAIRS, None)))
        for name in ("input_ids", "attention_mask", "labels")
    }
    expected, expected_metrics = trl_trainer(beta or 0.1).get_batch_loss_metrics(llama, peer_batch)
    output, logits = ours_through_full_logits(llama, batch, "trl", beta)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
    metrics = output.metrics(
        logits_chosen=logits[:NUM_PAIRS, :-1].mean(), logits_rejected=logits[NUM_PAIRS:, :-1].mean()
    )
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected_metrics, rel=1e-5)
    assert_gradients_agree(gradients(llama, output.loss), gradients(llama, expected))


@pytest.mark.parametrize(("beta", "pref_ftx"), [(None, 0.0), (0.7, 0.0), (None, 0.5)])
def test_llama_factory_preset_equals_llama_factory_on_a_llama(
    llama: LlamaForCausalLM, llama_factory_class: type, beta: float | None, pref_ftx: float
) -> None:
    batch = make_pair_batch()
    trainer = llama_factory_trainer(llama_factory_class, beta or 0.1, pref_ftx)
    expected, expected_metrics = trainer.get_batch_loss_metrics(llama, dataclasses.asdict(batch))
    preset = dataclasses.replace(get_preset("llama_factory"), nll_weight=1 + pref_ftx)
    output, _ = ours_through_full_logits(llama, batch, preset, beta)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
    metrics = {name: value.item() for name, value in output.metrics().items()}
    assert metrics["nll_loss"] == pytest.approx(expected_metrics["sft_loss"], rel=1e-5)
    for name in expected_metrics:
        if name.startswith(("rewards/", "logps/")):
            assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-5)
    if not pref_ftx:  # with it, LLaMA-Factory's figure holds the further NLL term too
        odds_ratio = output.odds_ratio_loss.item()
        assert odds_ratio == pytest.approx(expected_metrics["odds_ratio_loss"], rel=1e-5)
    assert_gradients_agree(gradients(llama, output.loss), gradients(llama, expected))


@pytest.mark.parametrize("nll_over", ["prompt+chosen", "chosen"])
def test_paper_preset_on_a_llama(llama: LlamaForCausalLM, nll_over: Any) -> None:
    """xfactlab/orpo is not a package. Like it: the NLL is the model's own loss, the log-odds are float64."""
    batch = make_pair_batch()
    preset = dataclasses.replace(get_preset("paper"), nll_over=nll_over)
    output, logits = ours_through_full_logits(llama, batch, preset)

    labels = batch.labels if nll_over == "chosen" else batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORED)
    chosen = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}
    nll = llama(**{name: value[:NUM_PAIRS] for name, value in chosen.items()}).loss
    mean_logps = []
    for row in range(2 * NUM_PAIRS):
        places = (batch.labels[row] != IGNORED).nonzero().flatten()
        logps = logits[row, places - 1].double().log_softmax(-1)[range(len(places)), batch.labels[row, places]]
        mean_logps.append(logps.mean())
    log_odds = torch.stack([torch.log(p / (1 - p)) for p in torch.stack(mean_logps).exp()])
    log_sigmoid = torch.log(torch.sigmoid(log_odds[:NUM_PAIRS] - log_odds[NUM_PAIRS:]))
    alpha = 1.0
    expected = nll.detach() - alpha * log_sigmoid.mean().float()
    torch.testing.assert_close(output.loss.detach(), expected, rtol=1e-5, atol=0)


def test_paper_log_odds_are_float64() -> None:
    """Two answers so alike that fp32 loses part of their log odds ratio; the output's dtype stays fp32."""
    logps = torch.tensor([[-9.000001], [-9.0]])
    mask = torch.ones_like(logps, dtype=torch.bool)
    l_w, l_l = logps.double().flatten().tolist()
    exact = (l_w - l_l) - (math.log1p(-math.exp(l_w)) - math.log1p(-math.exp(l_l)))
    errors = {}
    for preset in ("paper", "trl"):
        output = orpo_objective(logps, mask, None, mask[:1], preset=preset)
        assert output.loss.dtype == output.log_odds_chosen.dtype == torch.float32
        errors[preset] = abs(output.log_odds_chosen.item() - exact) / abs(exact)
    assert errors["paper"] < 1e-7 < 1e-6 < errors["trl"]


# --- the registry -------------------------------------------------------------------------------------------


def test_registry() -> None:
    assert set(PRESETS) == {"trl", "llama_factory", "paper"}
    for name, preset in PRESETS.items():
        assert get_preset(name) is preset
        assert get_preset(preset) is preset
        assert preset.name == name
    assert get_preset(None).beta == 0.1


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="preset='dpo' is unknown: use one of 'trl', 'llama_factory', 'paper'"):
        get_preset("dpo")
    with pytest.raises(TypeError, match="preset is a int"):
        get_preset(1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nll_over", "rejected"),
        ("nll_mean", "batch"),
        ("beta", -1.0),
        ("beta", math.nan),
        ("nll_weight", math.inf),
        ("odds_dtype", torch.float16),
    ],
)
def test_bad_preset_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        dataclasses.replace(get_preset("trl"), **{field: value})
