"""Packed and shared rows through a model's own layers, against each sequence alone."""

from __future__ import annotations

import itertools
import logging
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from compatibility import measured
from test_architectures import ARCHITECTURES, EXPERTS, HEADS, SIZES
from torch import Tensor, nn
from transformers import AttentionMaskInterface
from wrapping import VOCAB, tiny_llama

from orpo_kernels.integration.lm_head import attach
from orpo_kernels.integration.packing import attention
from orpo_kernels.integration.packing.gate import LayoutGate, model_inputs, refusal
from orpo_kernels.integration.packing.kernels import flash, flex
from orpo_kernels.integration.packing.layout import pack_pairs, pad_pairs
from orpo_kernels.integration.packing.segments import Segment, Segments
from orpo_kernels.objective import orpo_objective_flat

WINDOW = {"sliding_window": 4}
ROPE = {"rotary_pct": 0.5}


def built(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Makes a transformers model of that name with SIZES and these options."""

    def build() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**SIZES | options)
        kind = f"{name.removesuffix('Text')}ForCausalLM"
        return getattr(transformers, kind)(config)

    return build


EXACT: dict[str, Callable[[], nn.Module]] = {
    name: build for name, build in ARCHITECTURES.items() if name not in ("Mamba", "Falcon-H1", "T5")
} | {
    "Gemma": built("Gemma", **HEADS),
    "Qwen2": built("Qwen2", use_sliding_window=True, max_window_layers=1, **WINDOW),
    "Qwen3 MoE": built("Qwen3Moe", **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "Cohere 2": built("Cohere2", **HEADS, **WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "Phi-3": built("Phi3", **WINDOW),
    "OLMo 2": built("Olmo2"),
    "OLMo 3": built("Olmo3", **WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "GPT-NeoX": built("GPTNeoX", **ROPE),
    "Starcoder 2": built("Starcoder2", **WINDOW, residual_dropout=0.0, embedding_dropout=0.0),
    "OPT": built("OPT", ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "GLM": built("Glm", **HEADS),
    "SmolLM3": built("SmolLM3"),
    "Helium": built("Helium", **HEADS),
    "DeepSeek-V3": built(
        "DeepseekV3",
        q_lora_rank=16,
        num_key_value_heads=4,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
}

OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Mamba": (ARCHITECTURES["Mamba"], "state|layers are"),
    "Falcon-H1": (ARCHITECTURES["Falcon-H1"], "state|layers are"),
    "Falcon with ALiBi": (built("Falcon", alibi=True, hidden_dropout=0.0, attention_dropout=0.0), "AttentionInterface"),
    "Bloom": (built("Bloom", n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0), "AttentionInterface"),
    "MPT": (built("Mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=64), "AttentionInterface"),
    "Llama 4": (
        built(
            "Llama4Text",
            **HEADS,
            intermediate_size_mlp=48,
            num_local_experts=2,
            attention_chunk_size=4,
            layer_types=["chunked_attention", "full_attention"],
        ),
        "chunked_attention",
    ),
    "LFM2": (built("Lfm2", full_attn_idxs=[1]), "conv"),
    "Qwen3-Next": (
        built(
            "Qwen3Next",
            **HEADS,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
        "linear_attention",
    ),
}


def make(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model: Any = build().to(dtype).eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the grouped products of experts have no fp64
    return model


def pair(prompt: int, chosen: int, rejected: int, seed: int = 0) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1000 * seed + 100 * prompt + 10 * chosen + rejected)
    ids = torch.randint(3, VOCAB, (prompt + chosen + rejected,), generator=random).tolist()
    return {
        "chosen_input_ids": ids[: prompt + chosen],
        "chosen_prompt_length": prompt,
        "rejected_input_ids": ids[:prompt] + ids[prompt + chosen :],
        "rejected_prompt_length": prompt,
    }


SAME = pair(5, 3, 3)
SAME["rejected_input_ids"] = SAME["chosen_input_ids"]
PAIRS = [pair(7, 5, 9), pair(0, 4, 3), pair(12, 1, 1), SAME]


@pytest.fixture
def everything_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, rotations and softmaxes of fp64 models in fp64 too, where their code says fp32.

    Their backwards round gradients to fp32, and it makes a difference of 1e-8 whether a prompt's are rounded once
    or in two parts.
    """
    to, cast, softmax = Tensor.to, Tensor.type, F.softmax

    def of_a_model(tensor: Tensor) -> bool:
        # Positions too: they are multiplied with rotations' frequencies.
        wide = tensor.dtype in (torch.float64, torch.int64)
        return wide and sys._getframe(2).f_globals["__name__"].startswith("transformers.models")

    def wide(self: Tensor, *args: Any, **options: Any) -> Tensor:
        if of_a_model(self):
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            options = {key: torch.float64 if arg is torch.float32 else arg for key, arg in options.items()}
        return to(self, *args, **options)

    def wide_softmax(input: Tensor, dim: int = -1, dtype: Any = None, **options: Any) -> Tensor:
        return softmax(input, dim, dtype=None if input.dtype == torch.float64 else dtype, **options)

    monkeypatch.setattr(Tensor, "to", wide)

    def wide_cast(self: Tensor, *args: Any) -> Any:
        return self if args == (torch.float32,) and of_a_model(self) else cast(self, *args)

    monkeypatch.setattr(Tensor, "type", wide_cast)
    monkeypatch.setattr(Tensor, "float", lambda self: to(self, torch.float64 if of_a_model(self) else torch.float32))
    monkeypatch.setattr(F, "softmax", wide_softmax)


def alone(model: Any, pairs: list[dict[str, Any]]) -> Tensor:
    """The scored tokens' log-probabilities in the flat order, each sequence a batch of its own, from its logits."""
    found = []
    for side in ("chosen", "rejected"):
        for one in pairs:
            ids = torch.tensor(one[f"{side}_input_ids"])
            logps = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
            first = 1 if side == "chosen" else max(one["rejected_prompt_length"], 1)
            found.append(logps[first - 1 : -1].gather(1, ids[first:, None])[:, 0])
    return torch.cat(found)


def backward(model: Any, logps: Tensor) -> dict[str, Tensor]:
    """Every parameter's gradient of a sum of log-probabilities with unequal weights."""
    model.zero_grad()
    (logps * torch.linspace(-1, 2, len(logps), dtype=logps.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def through_layout(model: Any, batch: dict[str, Any]) -> Tensor:
    attention.use_packed_attention(model)
    return attach(model).logps(batch["targets"], rows=batch["rows"], use_cache=False, **model_inputs(batch))[0]


def check(model: Any, batch: dict[str, Any], expected: Tensor, gradients: dict[str, Tensor], tolerance: float) -> None:
    found = through_layout(model, batch)
    error = float((found - expected).detach().abs().max() / expected.abs().max())
    measured(losses=error)
    assert error <= tolerance
    of_found = backward(model, found)
    assert of_found.keys() == gradients.keys()
    whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert whole > 0.1
    for name, gradient in gradients.items():
        error = float((of_found[name] - gradient).norm())
        # A gradient that is zero by symmetry (a key's bias) is rounding and no more.
        if gradient.norm() > 1e-12 * whole:
            measured(gradients=error / float(gradient.norm()))
        assert error <= tolerance * (gradient.norm() + 1e-3 * whole), name


@pytest.mark.shows(
    "Layouts",
    "{name}, packed and shared",
    "log-probabilities and every gradient against each sequence alone, fp64: 1e-12",
)
@pytest.mark.parametrize("name", EXACT)
def test_rows_are_as_sequences_alone(name: str, everything_in_float64: None):
    model = make(EXACT[name])
    expected = alone(model, PAIRS)
    gradients = backward(model, expected)
    assert refusal(model) is None
    for share_prefix in (False, True):
        for row_length in (None, 24):
            batch = pack_pairs(PAIRS, share_prefix, row_length=row_length)
            assert (len(batch["input_ids"]) > 1) == (row_length is not None)
            check(model, batch, expected.detach(), gradients, 1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_the_gate_admits_them(name: str, caplog: pytest.LogCaptureFixture):
    model = make(EXACT[name], torch.float32)
    gate = LayoutGate(attach(model))
    batch = pack_pairs(PAIRS, True)
    assert gate.admit(batch) is batch
    assert (gate.name, gate.reasons, caplog.records) == ("shared", [], [])
    # Calls without segments are what they were: generation, say.
    usual = make(EXACT[name], torch.float32)
    ids = torch.tensor([PAIRS[0]["chosen_input_ids"], [0, 0] + PAIRS[0]["chosen_input_ids"][2:]])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    generate = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**generate), usual.generate(**generate))


@pytest.mark.shows("Layouts", "{name}", "falls back to padded rows with one warning; gradients as padded", "falls back")
@pytest.mark.parametrize("name", OTHERS)
def test_models_that_cannot_be_exact_fall_back(name: str, caplog: pytest.LogCaptureFixture):
    build, reason = OTHERS[name]
    model = make(build, torch.float32)
    before = model.config._attn_implementation
    ours = attach(model)
    gate = LayoutGate(ours)
    batch = gate.admit(pack_pairs(PAIRS, True))
    batch = gate.admit(pack_pairs(PAIRS, False))
    assert gate.name == batch["layout"].name == "padded"
    assert model.config._attn_implementation == before
    (record,) = caplog.records  # once, not a batch
    assert record.levelno == logging.WARNING
    assert "batches are padded, not shared" in record.message
    assert re.search(reason, record.message), record.message
    found, _ = ours.logps(batch["targets"], rows=batch["rows"], use_cache=False, **model_inputs(batch))
    torch.testing.assert_close(found, alone(model, PAIRS).float(), rtol=1e-4, atol=1e-4)


# ---- the attention function by itself ----


def by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition, a query at a time: [rows, T, H, E]."""
    rows, heads, length, _ = query.shape
    group = heads // key.shape[1]
    found = torch.zeros(rows, length, heads, value.shape[-1], dtype=query.dtype)
    for row, in_row in enumerate(segments.by_row):
        leader: Segment | None = None
        for segment in in_row:
            prefix = list(range(leader.start, leader.start + segment.prefix)) if segment.prefix and leader else []
            for at in range(segment.start, segment.start + segment.length):
                seen = (prefix + list(range(segment.start, at + 1)))[-(window or length) :]
                for head in range(heads):
                    scores = key[row, head // group, seen] @ query[row, head, at] * scaling
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    weights = scores.exp()
                    total = weights.sum() + (0 if sinks is None else sinks[head].exp())
                    found[row, at, head] = weights / total @ value[row, head // group, seen]
            leader = leader if segment.prefix else segment
    return found


TWO_ROWS = Segments.of(
    2,
    12,
    [
        *(Segment(0, 0, 5), Segment(0, 5, 3, prefix=2), Segment(0, 8, 4)),
        # A group of three, behind one of one.
        *(Segment(1, 0, 1), Segment(1, 1, 4), Segment(1, 5, 1, prefix=4), Segment(1, 6, 4, prefix=3)),
    ],
)
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 3},
    "wide window": {"window": 64},
    "soft-cap": {"softcap": 2.0, "window": 3},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)},
}


def heads_of(segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    shape = (segments.rows, segments.length, 4, 8)

    def states(heads: int) -> Tensor:
        # Laid out as models have them: heads behind places.
        wide = torch.randn(shape[0], shape[1], heads, shape[3], dtype=torch.float64, generator=random)
        return wide.transpose(1, 2).requires_grad_()

    return states(4), states(2), states(2)


def ours(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float, **features: Any) -> Tensor:
    names = {"window": "sliding_window", "softcap": "softcap", "sinks": "s_aux"}
    options = {names[name]: value for name, value in features.items()}
    module = types.SimpleNamespace(is_causal=True, layer_idx=0)
    found, weights = attention.segment_attention(
        module, query, key, value, None, segments=segments, scaling=scaling, **options
    )
    assert weights is None
    return found


def gradients(found: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view(found.shape)
    return list(torch.autograd.grad((found * weights).sum(), inputs))


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_attention_is_the_definition(features: dict[str, Any]):
    inputs = heads_of(TWO_ROWS)
    expected = by_hand(*inputs, TWO_ROWS, 0.3, **features)
    found = ours(*inputs, TWO_ROWS, 0.3, **features)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    sinks = [features["sinks"]] if "sinks" in features else []
    of_found, of_expected = (gradients(out, [*inputs, *sinks]) for out in (found, expected))
    for a, b in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_flex_attention_is_the_definition(features: dict[str, Any]):
    """Uncompiled; it has no backward on a CPU."""
    full = dict.fromkeys(("window", "softcap", "sinks")) | features
    with torch.no_grad():
        inputs = [tensor.detach() for tensor in heads_of(TWO_ROWS)]
        expected = by_hand(*inputs, TWO_ROWS, 0.3, **features)
        found = flex(*inputs, TWO_ROWS, 0.3, **full)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("features", [FEATURES["plain"], FEATURES["window"], FEATURES["soft-cap"]])
def test_what_flash_attention_is_given(features: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """A stand-in for its function, by its documentation: sequences by their starts, causal at the bottom right."""

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
    ) -> Tensor:
        assert causal
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert max_seqlen_q == max(b - a for a, b in itertools.pairwise(starts_q))
        assert max_seqlen_k == max(b - a for a, b in itertools.pairwise(starts_k))
        group, found = q.shape[1] // k.shape[1], []
        for index in range(len(starts_q) - 1):
            queries = q[starts_q[index] : starts_q[index + 1]]
            keys, values = (x[starts_k[index] : starts_k[index + 1]].repeat_interleave(group, 1) for x in (k, v))
            own = torch.arange(len(keys))[len(keys) - len(queries) :, None]
            scores = torch.einsum("qhe,khe->hqk", queries, keys) * softmax_scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            place = torch.arange(len(keys))
            seen = (place <= own) & ((window_size[0] < 0) | (place >= own - window_size[0]))
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            found.append(torch.einsum("hqk,khe->qhe", weights, values))
        return torch.cat(found)

    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    inputs = heads_of(TWO_ROWS)
    found = flash(*inputs, TWO_ROWS, 0.3, features.get("window"), features.get("softcap"))
    expected = by_hand(*inputs, TWO_ROWS, 0.3, **features)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ---- in a model ----


@pytest.mark.parametrize("one", [pair(0, 4, 3), pair(12, 1, 1), pair(1, 1, 1), SAME])
@pytest.mark.parametrize("share_prefix", [False, True])
def test_a_batch_of_one(one: dict[str, Any], share_prefix: bool, everything_in_float64: None):
    usual, batch = tiny_llama().double(), pack_pairs([one], share_prefix)
    expected = alone(usual, [one])
    gate = LayoutGate(attach(model := tiny_llama().double()))
    assert gate.admit(batch) is batch
    check(model, batch, expected.detach(), backward(usual, expected), 1e-12)


@pytest.mark.filterwarnings("ignore:.*empty completion")
@pytest.mark.parametrize("share_prefix", [False, True])
def test_nothing_to_score_has_gradients_of_zero(share_prefix: bool):
    """P = 0, C = 1, R = 1: nothing predicts a first token. A rank without a gradient would keep others waiting."""
    model, batch = tiny_llama(), pack_pairs([pair(0, 1, 1)], share_prefix)
    gate = LayoutGate(attach(model))
    assert gate.admit(batch) is batch
    logps = through_layout(model, batch)
    output = orpo_objective_flat(logps, batch["pair"], batch["kind"], num_pairs=1, preset="trl")
    output.loss.backward()
    assert output.loss == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.shows("Layouts", "gradient checkpoints, both kinds", "gradients as without")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_find_the_layout_again(reentrant: bool):
    batch = pack_pairs(PAIRS, True)
    expected = backward(model := tiny_llama().train(), through_layout(model, batch))
    model = tiny_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = through_layout(model, batch)
    # What runs in between must not reach the layers that are computed again.
    with torch.no_grad():
        through_layout(model, pack_pairs(PAIRS[:2], False))
    for name, gradient in backward(model, found).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_no_mask_is_made(monkeypatch: pytest.MonkeyPatch):
    def made(*args: Any, **options: Any) -> None:
        raise AssertionError("a mask was made")

    model = tiny_llama()
    for name in attention.NAMES:
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, made)
    through_layout(model, pack_pairs(PAIRS, True))
    with pytest.raises(AssertionError, match="a mask was made"):
        model(input_ids=torch.ones(2, 3, dtype=torch.int64), attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]]))


@pytest.mark.shows("Layouts", "`torch.compile`", "no recompilation for other batches")
def test_a_compiled_model_is_compiled_once():
    """Not for each batch's lengths."""
    model = tiny_llama(num_hidden_layers=1)
    gate = LayoutGate(attach(model))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")

    def found(pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = gate.admit(pack_pairs(pairs, True), compiled)
        assert batch["layout"].name == "shared"
        logps, _ = gate.logps.logps(
            batch["targets"], rows=batch["rows"], model=compiled, use_cache=False, **model_inputs(batch)
        )
        return backward(model, logps)

    found(PAIRS[:2]), found(PAIRS[1:])
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for pairs in (PAIRS, PAIRS[::2], [pair(3, 9, 2), pair(4, 4, 4)]):
        of_compiled = found(pairs)
        usual = tiny_llama(num_hidden_layers=1)
        for name, gradient in backward(usual, alone(usual, pairs)).items():
            torch.testing.assert_close(of_compiled[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    torch._dynamo.reset()


@pytest.mark.shows("Adapters", "LoRA, packed and shared rows", "gradients against padded rows")
def test_lora():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    found = []
    for batch in (pad_pairs(PAIRS), pack_pairs(PAIRS, False), pack_pairs(PAIRS, True)):
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = peft.get_peft_model(tiny_llama(), config)
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        gate = LayoutGate(attach(model))
        assert gate.admit(batch) is batch
        logps, _ = gate.logps.logps(batch["targets"], rows=batch["rows"], use_cache=False, **model_inputs(batch))
        found.append(backward(model, logps))
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.norm()), msg=name)


# ---- what the gate refuses ----


def llama_with(**changes: Any) -> Callable[[], nn.Module]:
    return lambda: tiny_llama(**changes)


def deaf() -> nn.Module:
    """Does not hand keyword arguments down to its layers."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: (args, {k: v for k, v in kwargs.items() if k != "segments"}), with_kwargs=True
        )
    return model


def wandering() -> nn.Module:
    """Lets tokens see the whole row beside its attention."""
    model = tiny_llama()
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))
    return model


def windowed_by_its_mask() -> nn.Module:
    """Has a window that its attention is not told of."""
    model = make(EXACT["Mistral"], torch.float32)
    for layer in model.model.layers:
        layer.self_attn.config = transformers.MistralConfig(**SIZES, **HEADS, sliding_window=None)
        layer.self_attn.config._attn_implementation = "sdpa"
    original = model.set_attn_implementation

    def both(name: str, **options: Any) -> None:
        original(name, **options)
        for layer in model.model.layers:
            layer.self_attn.config._attn_implementation = name

    model.set_attn_implementation = both
    return model


def t5_like() -> nn.Module:
    return make(ARCHITECTURES["T5"], torch.float32)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "attention dropout": (llama_with(attention_dropout=0.1), "dropout is on"),
    "a router's loss": (built("Mixtral", **HEADS, **EXPERTS, output_router_logits=True), "router's loss"),
    "an encoder": (t5_like, "an encoder reads the prompt"),
    "lost keyword arguments": (deaf, "is not handed the model's keyword arguments"),
    "a mean over the row": (wandering, "log-probabilities differ from padded rows by"),
    "a window in the mask only": (windowed_by_its_mask, "window of None where the configuration says 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, caplog: pytest.LogCaptureFixture):
    build, reason = REFUSED[name]
    torch.manual_seed(0)
    gate = LayoutGate(attach(model := build()))
    before = model.config._attn_implementation
    assert gate.admit(pack_pairs(PAIRS, True))["layout"].name == "padded"
    assert model.config._attn_implementation == before
    assert len(caplog.records) == 1
    assert reason in caplog.records[0].message


def test_a_model_that_shares_badly_is_packed(caplog: pytest.LogCaptureFixture):
    def refuse_prefixes(model: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        segments = inputs.get("segments")
        if segments is not None and any(segment.prefix for row in segments.by_row for segment in row):
            raise attention.UnsupportedLayout("no")

    model = tiny_llama()
    model.register_forward_pre_hook(refuse_prefixes, with_kwargs=True)
    gate = LayoutGate(attach(model))
    batch = gate.admit(pack_pairs(PAIRS, True))
    assert batch["layout"].name == gate.name == "packed"
    (record,) = caplog.records
    assert "batches are packed, not shared: the model does not allow it (shared: no)" in record.message
    usual = tiny_llama()
    expected = alone(usual, PAIRS)
    check(model, batch, expected.detach(), backward(usual, expected), 1e-5)


def test_one_process_that_refuses_speaks_for_all():
    gate = LayoutGate(attach(tiny_llama()), everywhere=lambda verdict: False)
    assert gate.admit(pack_pairs(PAIRS, True))["layout"].name == "padded"
    assert gate.reasons == [f"{name}: refused by another process" for name in ("shared", "packed")]
