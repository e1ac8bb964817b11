"""Attention, 4-bit layers and optimisers against the real ones; the facts of models against their published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers.optimization import Adafactor

from orpo_kernels.integration.memory.attention import attention_as_run
from orpo_kernels.integration.memory.configurations import config_of
from orpo_kernels.integration.memory.four_bit import FourBitLinear
from orpo_kernels.integration.memory.optimizers import Weight, state_bytes
from orpo_kernels.models import CONFIGS

# As the models' cards and checkpoints have them.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "gemma-3-1b": 999_885_952,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-1.5b": 1_543_714_304,
    "smollm2-1.7b": 1_711_376_384,
    "gemma-2-2b": 2_614_341_888,
    "llama-3.2-3b": 3_212_749_824,
    "phi-3-mini": 3_821_079_552,
    "qwen3-4b": 4_022_468_096,
    "olmoe-1b-7b": 6_919_161_856,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-9b": 9_241_705_984,
    "mistral-nemo-12b": 12_247_782_400,
    "phi-4": 14_659_507_200,
    "qwen3-14b": 14_768_307_200,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-32b": 32_762_123_264,
    "mixtral-8x7b": 46_702_792_704,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-72b": 72_706_203_648,
}


def test_every_model_has_its_published_parameters():
    from transformers import AutoModelForCausalLM

    from orpo_kernels.integration.memory.architecture import quiet

    assert CONFIGS.keys() == PARAMETERS.keys()
    for name, published in PARAMETERS.items():
        with torch.device("meta"), quiet():
            model: Any = AutoModelForCausalLM.from_config(config_of(name)[0])
            model.tie_weights()
        assert sum(parameter.numel() for parameter in model.parameters()) == published, name
        assert model.dtype == torch.bfloat16, name


def saved_bytes(function: Any, *inputs: Tensor) -> int:
    """What autograd holds of a call, inputs included, a storage once."""
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(*inputs)
    assert out.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_holds_what_a_cpus_does(masked: bool, heads: tuple[int, int], dtype: torch.dtype):
    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = torch.ones(2, 1, 40, 40, dtype=torch.bool) if masked else None
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=not masked, enable_gqa=heads[0] != heads[1]
        )

    def inputs() -> list[Tensor]:
        return [torch.zeros(2, h, 40, 16, dtype=dtype, requires_grad=True) for h in (heads[0], heads[1], heads[1])]

    right = saved_bytes(call, *inputs())
    with FakeTensorMode(), attention_as_run("cpu"):
        assert saved_bytes(call, *inputs()) == right


def test_attention_on_a_gpu():
    """Half without a mask: no [T, T]. With one: a mask of the query's dtype. Groups in fp32: all scores."""

    def saved(dtype: torch.dtype, kv: int, masked: bool) -> int:
        with FakeTensorMode(), attention_as_run("cuda"):
            q, k, v = (torch.zeros(1, h, 1000, 64, dtype=dtype, requires_grad=True) for h in (8, kv, kv))
            mask = torch.ones(1, 1, 1000, 1000, dtype=torch.bool) if masked else None
            return saved_bytes(
                lambda *qkv: F.scaled_dot_product_attention(
                    *qkv, attn_mask=mask, is_causal=not masked, enable_gqa=kv != 8
                ),
                q, k, v,
            )  # fmt: skip

    row = 1000 * 64 * 2
    sums = 8 * 1000 * 4
    assert saved(torch.bfloat16, 2, False) == (8 + 2 + 2 + 8) * row + sums
    assert saved(torch.bfloat16, 8, True) == 4 * 8 * row + sums + 1000 * 1000 * 2
    assert saved(torch.float32, 2, False) > 8 * 1000 * 1000 * 4


def test_four_bit_weights_are_as_large_as_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(320, 256)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    right = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    layer = FourBitLinear(nn.Linear(256, 320, bias=False))
    held = sum(x.nbytes for x in (*layer.parameters(), *layer.buffers()))
    assert held == right


def test_four_bit_layers_save_no_input():
    layer = FourBitLinear(nn.Linear(256, 320, bias=False))
    x = torch.zeros(7, 256, requires_grad=True)
    out = layer(x)
    assert out.shape == (7, 320)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


OPTIMIZERS: dict[str, Any] = {
    "adamw_torch": lambda p: torch.optim.AdamW(p),
    "adamw_torch_fused": lambda p: torch.optim.AdamW(p, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "adafactor": lambda p: Adafactor(p, scale_parameter=False, relative_step=False, lr=0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizers_hold_what_the_real_ones_do(name: str, dtype: torch.dtype):
    weights = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((96, 40), (50,))]
    optimizer = OPTIMIZERS[name](weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    held = sum(
        x.nbytes for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor) and x.dim()
    )
    assert state_bytes(name, [Weight(tuple(w.shape), w.itemsize) for w in weights]) == held


def test_eight_bit_states():
    """By bitsandbytes' own description: blocks of 256, small weights and embeddings in fp32."""
    large, small = Weight((128, 64), 2), Weight((64, 63), 2)
    assert state_bytes("adamw_8bit", [large]) == 2 * (128 * 64 + 4 * 32)
    assert state_bytes("adamw_8bit", [small]) == 2 * 4 * 64 * 63
    assert state_bytes("adamw_8bit", [large._replace(is_embedding=True)]) == 2 * 4 * 128 * 64
    assert state_bytes("adamw_8bit", [large._replace(layers=5)]) == 5 * state_bytes("adamw_8bit", [large])
    assert state_bytes("paged_adamw_8bit", [large]) == 0
