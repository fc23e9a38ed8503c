"""Weights in 8 and 4 bits: the error of each kernel, and a decoder that has them."""

import pytest
import torch
from torch import nn

from tests.generate.test_lean_step import steps
from tests.model.test_decoder import EACH, assert_same, make, some_ids
from tinylm.common.errors import UserError
from tinylm.config.model import MoEConfig
from tinylm.model import rounded as rounded_weights
from tinylm.model.rounded import (
    FEW_ROWS,
    Int4Linear,
    Int8Linear,
    dequantize,
    fp32_product,
    int8_product,
    multiplies_int8,
    quantize,
    quantize_groups,
    quantize_rows,
    rounded,
    rounded_layer,
)


@pytest.fixture(params=["this CPU", "no VNNI"])
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The functions that this CPU uses, and those of one without VNNI."""
    if request.param == "no VNNI":
        monkeypatch.setattr(rounded_weights, "multiplies_int8", lambda: False)
    return request.param


def test_what_this_cpu_multiplies_is_exact(monkeypatch):
    """The largest codes: a CPU without VNNI has less than 64 · 127 for the sum of 64 of them, and one
    whose product is forced to be so is found out.
    """
    product = int8_product if multiplies_int8() else fp32_product
    codes = torch.full((16, 64), 127, dtype=torch.int8)
    y = product(codes, torch.ones(16))(torch.ones(40, 64))
    assert (y - 127 * 64).abs().max() < 0.01
    monkeypatch.setattr(
        rounded_weights, "int8_product", lambda codes, scale: lambda rows: torch.zeros(32, 16)
    )
    assert not multiplies_int8.__wrapped__()


@pytest.mark.parametrize("n_in", [32, 24])
@pytest.mark.parametrize("n_rows", [1, FEW_ROWS[8], FEW_ROWS[8] + 1, 40])
def test_a_product_differs_by_rounding_only(n_rows, n_in, cpu):
    """The codes are exact here: inputs in bf16 have an error of 2^-9, inputs in int8 of 1/254 of the
    largest. 24 inputs take the second kernel always.
    """
    torch.manual_seed(0)
    weight, bias = torch.randint(-127, 128, (31, n_in)).float(), torch.randn(31)
    weight[:, 0] = 127
    x = torch.randn(n_rows, n_in)
    layer = Int8Linear(*quantize_rows(weight), bias)
    assert torch.equal(layer.codes.float(), weight)
    exact = x @ weight.T + bias
    assert (layer(x) - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("n_rows", [1, 40])
def test_a_row_does_not_depend_on_the_others(n_rows):
    """A row 1000 times larger beside it: with one scale for all rows, its inputs would all be 0."""
    torch.manual_seed(0)
    layer, x = Int8Linear(*quantize_rows(torch.randn(31, 32)), None), torch.randn(n_rows, 32)
    with_others = torch.cat((x, 1000 * torch.randn(60, 32)))
    alone = layer(torch.cat((x, torch.zeros(60, 32))))[:n_rows]
    assert torch.equal(layer(with_others)[:n_rows], alone)


def test_rows_of_zeros_stay_zeros():
    layer = Int8Linear(*quantize_rows(torch.zeros(16, 32)), None)
    for n_rows in (1, 40):
        assert torch.equal(layer(torch.randn(n_rows, 32)), torch.zeros(n_rows, 16))
    assert torch.isfinite(
        Int8Linear(*quantize_rows(torch.randn(16, 32)), None)(torch.zeros(40, 32))
    ).all()


MIXTURE = {"moe": MoEConfig(n_experts=3, top_k=2), "bias": "all"}


@EACH
@torch.no_grad()
def test_a_decoder_with_them_is_near_and_its_lean_step_equal(options):
    """Far fewer weights are floats, and the logits move by less than a fifth of their spread."""
    model, ids = make(spread=0.1, **options), some_ids()
    exact = model(ids)
    quantize(model)
    assert not any(
        isinstance(layer, nn.Linear) and layer.out_features > 3 for layer in model.modules()
    )
    assert 0 < (model(ids) - exact).std() < 0.2 * exact.std()
    assert_same_but_for_a_tie(steps(model))


def assert_same_but_for_a_tie(pairs):
    """An input midway between two of its codes gets either, by the last bit of what came before; the
    CPU decides that. The logits of that text then differ by what one code of one input is worth, from
    there on; the other two texts are equal up to fp32 rounding.
    """
    lean, plain = (torch.stack(side, dim=1) for side in zip(*pairs, strict=True))  # (B, steps, V)
    farthest = (lean - plain).abs().amax(dim=(1, 2)) / plain.abs().max()  # (B,)
    in_order = farthest.argsort()
    assert_same(lean[in_order[:-1]], plain[in_order[:-1]])
    assert farthest.max() < 2e-3


@pytest.mark.parametrize("n_rows", [1, FEW_ROWS[4], FEW_ROWS[4] + 1, 40])
def test_a_product_in_4_bits_has_the_error_of_its_rounding(n_rows, cpu):
    """The codes are exact here: 0 to 15 in each group of 32, with scale 1 or 2 and an offset."""
    torch.manual_seed(0)
    codes, bias = torch.randint(0, 16, (48, 4, 32)).float(), torch.randn(48)
    codes[..., 0], codes[..., 1] = 0, 15
    weight = (codes * torch.tensor([1.0, 2, 1, 2])[:, None] - 7).flatten(1)
    layer = rounded_layer(rounded(weight, 4), bias)
    assert isinstance(layer, Int4Linear)
    x = torch.randn(n_rows, 128)
    exact = x @ weight.T + bias
    assert (layer(x) - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("shape", [(48, 128), (3, 16, 64)])
def test_numbers_that_4_bits_can_write_are_read_back_exactly(shape):
    """-8 to 7 times a scale and plus an offset of each group, powers of 2: bf16 has them exactly."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (*shape[:-1], shape[-1] // 32, 32)).float()
    codes[..., 0], codes[..., 1] = 0, 15
    scale = 2.0 ** torch.randint(-6, 3, codes.shape[:-1])
    weight = (codes - 8 + 16 * torch.randint(-2, 3, scale.shape)[..., None]) * scale[..., None]
    weight = weight.flatten(-2)
    parts = quantize_groups(weight)
    assert [part.dtype for part in parts] == [torch.uint8, torch.bfloat16, torch.bfloat16]
    assert torch.equal(dequantize(parts), weight)
    n_bytes = sum(part.nbytes for part in parts)
    assert n_bytes == 0.625 * weight.numel()


def test_a_shape_without_groups_has_8_bits():
    for shape in ((48, 40), (40, 64)):
        layer = rounded_layer(rounded(torch.randn(shape), 4), None)
        assert type(layer) is Int8Linear


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False, "bias": "all"}, MIXTURE])
@torch.no_grad()
def test_a_decoder_in_4_bits_is_near_and_its_lean_step_equal(options):
    model = make(spread=0.1, d_model=32, n_heads=2, d_ff=64, vocab_size=32, **options)
    exact, ids = model(some_ids()), some_ids()
    quantize(model, 4)
    assert any(isinstance(layer, Int4Linear) for layer in model.modules())
    assert 0 < (model(ids) - exact).std() < 0.5 * exact.std()
    for lean, plain in steps(model):
        assert_same(lean, plain)


def test_experts_have_8_bits_too():
    model = make(moe=MoEConfig(n_experts=3, top_k=2))
    quantize(model)
    sizes = {weight.numel() for name, weight in model.named_parameters() if "ffn." in name}
    assert sizes == {3 * 24}  # the router


def test_another_device_is_an_error():
    with pytest.raises(UserError) as caught:
        quantize(make().to("meta"))
    assert str(caught.value) == (
        "weights: int8: 8 and 4 bits are only supported on the CPU, with oneDNN. "
        "Use --device cpu, or fp32 weights."
    )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("batch", [1, 12])
@torch.no_grad()
def test_the_lean_step_in_bf16_uses_the_rounded_matrices(bits, batch):
    """Few rows and many; another matrix would be as far as the logits spread."""
    model = make(spread=0.1, d_model=32, n_heads=2, d_ff=64, vocab_size=32)
    quantize(model, bits)
    for lean, plain in steps(model.bfloat16(), batch=batch):
        assert (lean.float() - plain.float()).abs().max() < 0.1 * plain.float().std()
