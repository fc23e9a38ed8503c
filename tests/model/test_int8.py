"""Weights in 8 bits: the error of each kernel, and a decoder that has them."""

import pytest
import torch
from torch import nn

from tests.generate.test_lean_step import steps
from tests.model.test_decoder import EACH, assert_same, make, some_ids
from tinylm.common.errors import UserError
from tinylm.config.schema import MoEConfig
from tinylm.model.int8 import FEW_ROWS, Int8Linear, quantize


@pytest.mark.parametrize("n_in", [32, 24])
@pytest.mark.parametrize("n_rows", [1, FEW_ROWS, FEW_ROWS + 1, 40])
def test_a_product_differs_by_rounding_only(n_rows, n_in):
    """The codes are exact here: inputs in bf16 have an error of 2^-9, inputs in int8 of 1/254 of the
    largest. 24 inputs take the second kernel always.
    """
    torch.manual_seed(0)
    weight, bias = torch.randint(-127, 128, (31, n_in)).float(), torch.randn(31)
    weight[:, 0] = 127
    x = torch.randn(n_rows, n_in)
    layer = Int8Linear(weight, bias)
    assert torch.equal(layer.codes.float(), weight)
    exact = x @ weight.T + bias
    assert (layer(x) - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("n_rows", [1, 40])
def test_a_row_does_not_depend_on_the_others(n_rows):
    """A row 1000 times larger beside it: with one scale for all rows, its inputs would all be 0."""
    torch.manual_seed(0)
    layer, x = Int8Linear(torch.randn(31, 32), None), torch.randn(n_rows, 32)
    with_others = torch.cat((x, 1000 * torch.randn(60, 32)))
    alone = layer(torch.cat((x, torch.zeros(60, 32))))[:n_rows]
    assert torch.equal(layer(with_others)[:n_rows], alone)


def test_rows_of_zeros_stay_zeros():
    layer = Int8Linear(torch.zeros(16, 32), None)
    for n_rows in (1, 40):
        assert torch.equal(layer(torch.randn(n_rows, 32)), torch.zeros(n_rows, 16))
    assert torch.isfinite(Int8Linear(torch.randn(16, 32), None)(torch.zeros(40, 32))).all()


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
        "weights: int8: 8 bits are only supported on the CPU, with oneDNN. "
        "Use --device cpu, or fp32 weights."
    )
