"""Rounding of groups: half a step, numbers at the ends of float16, which axis shares a scale."""

import pytest
import torch

from mha2mla.kivi_groups import BITS, Groups
from tests.tiny import relative


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_read_back_is_within_half_a_step(bits: int, by_channel: bool, dtype: torch.dtype) -> None:
    """Of its own group: the step of other groups, ten times smaller or larger, does not do."""
    generator = torch.Generator().manual_seed(bits)
    size = 10.0 ** torch.arange(-2, 3).repeat_interleave(32)[:, None]  # of each of five groups of tokens
    states = ((torch.randn(2, 3, 160, 12, generator=generator) + 0.5) * size).to(dtype)
    groups = Groups(bits, 32, 12, by_channel)
    groups.append(states[:, :, :64])
    groups.append(states[:, :, 64:])
    back = groups.read(dtype)
    assert back.dtype == dtype and torch.equal(back, groups.rounded(states))
    split = states.float().unflatten(2, (-1, 32))
    axis = 3 if by_channel else 4
    step = (split.amax(axis, keepdim=True) - split.amin(axis, keepdim=True)) / (2**bits - 1)
    error = (back.float().unflatten(2, (-1, 32)) - split).abs()
    rounding = split.abs() * torch.finfo(dtype).eps + split.abs().amax(axis, keepdim=True) * 2**-10
    assert (error <= 0.5 * step + rounding).all()
    assert (error > 0.4 * step).any() and not (error <= 0.5 * step.roll(1, 2) + rounding).all()


def test_numbers_that_float16_cannot_hold_stay_finite() -> None:
    for value in (1e6, 0.0, 1e-9):
        states = torch.full((1, 1, 32, 8), value) * torch.linspace(-1, 1, 32)[:, None]
        for by_channel in (True, False):
            back = Groups(2, 32, 8, by_channel).rounded(states)
            assert back.isfinite().all() and float(back.abs().max()) <= max(1.0 * value, 2e-4)


def outliers(keys: torch.Tensor) -> torch.Tensor:
    """Keys with one channel in eight that is large for every token, as those of trained models have."""
    return keys + 20 * (torch.arange(keys.shape[-1]) % 8 == 3)


def test_keys_with_outlier_channels_need_a_scale_a_channel() -> None:
    """Control of the axis: with a scale a token, as values have, the same bits lose clearly more."""
    keys = outliers(torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(0)))
    for bits in BITS:
        by_channel, by_token = (relative(Groups(bits, 32, 32, axis).rounded(keys), keys) for axis in (True, False))
        assert by_channel < 0.3 * by_token
