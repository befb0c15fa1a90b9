"""The cost of a lost rotation over any context: what a plain sum gives, without a tensor as long as the context."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mha2mla import ConversionOptions, collect_statistics, convert
from mha2mla.partial_rope import harmonic_sums, mean_rotation, rotation_loss
from tests.tiny import preset, tiny_model, tokens

ROTARY = [1e4 ** -(pair / 32) for pair in range(32)] + [5e5 ** -(pair / 32) for pair in range(32)]
FREQUENCIES = torch.tensor([*ROTARY, 0.0, 1e-9, 3.14159265, 6.2831853, 100.0], dtype=torch.float64)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made meanwhile."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.numel() * each.element_size())
        return made


@pytest.mark.parametrize("context", [1, 2, 3, 5, 7, 63, 64, 65, 1000, 8192, 100_001])
def test_it_is_the_plain_sum(context: int) -> None:
    weights = 1 / (1 + torch.arange(context, dtype=torch.float64))
    plain = mean_rotation(FREQUENCIES, weights)
    sums = harmonic_sums(FREQUENCIES, context)
    assert float((sums / weights.sum() - plain).abs().max()) < 1e-12
    torch.testing.assert_close(rotation_loss(FREQUENCIES, context), (2 - 2 * plain.real).float(), rtol=1e-6, atol=1e-12)


def test_contexts_of_any_length_take_little_memory() -> None:
    for context in (10_000_000, 10**9, 10**15):
        with Largest() as largest:
            found = rotation_loss(FREQUENCIES, context)
        assert largest.bytes < 1 << 20
        assert bool(found.isfinite().all()) and float(found[0]) > 1.8 and float(found[64]) == 0
        # The longer the context, the further a slow pair turns; a sum of a thousandth of it is another number.
        assert float(found[63]) > 1.05 * float(rotation_loss(FREQUENCIES, context // 1000)[63])
    with Largest() as largest:  # a control: what a plain sum takes of less than a thousandth
        mean_rotation(FREQUENCIES, torch.ones(10_000))
    assert largest.bytes > 1 << 20


def test_a_conversion_of_a_model_of_ten_million_positions_takes_little_memory() -> None:
    model = tiny_model(max_position_embeddings=10_000_000)
    statistics = collect_statistics(model, [tokens()])
    with Largest() as largest:
        convert(model, ConversionOptions(**preset("best"), reduction=0.5), statistics)
    assert largest.bytes < 1 << 20
