"""The one table of tolerances: what counts as equal in each dtype, in every test."""

import torch

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    # Half precision is compared with the exact result for the same inputs. Every intermediate result is rounded to 11
    # or 8 bits, an error of 2^-11 or 2^-8, about ten times in a row in a layer, in two layers: 20 times that.
    torch.float16: 1e-2,
    torch.bfloat16: 8e-2,
}
"""The largest error allowed, times max(1, |value|)."""


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, what: str = "values", dtype: torch.dtype | None = None
) -> None:
    """Fails where an entry of `actual` is further from `expected` than the table allows for `dtype` (None: its own).

    `expected` may be of another floating dtype. A NaN or an infinity is never close to anything.
    """
    tolerance = TOLERANCE[actual.dtype if dtype is None else dtype]
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).abs() / expected.abs().clamp(min=1)
    wrong = ~(error <= tolerance)
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} entries differ, by up to {float(error.max()):.3g} times "
        f"max(1, |value|), where {tolerance:g} is allowed"
    )
