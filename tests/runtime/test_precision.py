"""How float32 products are rounded inside, and that it is as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llm_pruner.runtime.precision import exact_products, fast_products

BACKENDS = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))

pytestmark = pytest.mark.skipif(
    not all(hasattr(one, "fp32_precision") for one in BACKENDS),
    reason="PyTorch before 2.9 has no precision of a backend",
)


def said() -> list[str]:
    return [one.fp32_precision for one in BACKENDS]


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    of_all, before = torch.get_float32_matmul_precision(), said()
    yield
    torch.set_float32_matmul_precision(of_all)
    for one, value in zip(BACKENDS, before, strict=True):
        one.fp32_precision = value


@pytest.mark.parametrize("place", [0, 1])
def test_precision_that_was_set_for_a_backend(place: int) -> None:
    BACKENDS[place].fp32_precision = "tf32"
    before = said()
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        torch.get_float32_matmul_precision()
    with exact_products():
        assert said() == ["ieee", "ieee"]
        with fast_products():
            assert said() == ["tf32", "bf16"]
        assert said() == ["ieee", "ieee"]
    assert said() == before


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precision_that_was_set_for_all(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    before = said()
    with exact_products(), fast_products():
        assert torch.get_float32_matmul_precision() == "medium"
    assert (torch.get_float32_matmul_precision(), said()) == (precision, before)
