"""Standard errors and paired intervals against formulas and known cases."""

import numpy
import pytest

from eval.uncertainty import drop_interval, standard_error


def test_the_standard_error_is_that_of_a_mean() -> None:
    assert standard_error([0, 1, 1, 0]) == pytest.approx(100 * (1 / 3) ** 0.5 / 2)
    assert standard_error([0.5, 0.5]) == 0 and standard_error([1.0]) is None


def test_the_interval_holds_the_drop_at_its_rate() -> None:
    """Of a hundred experiments about ninety-five intervals hold the true drop of ten points."""
    generator, held = numpy.random.default_rng(1), 0
    for _ in range(100):
        hard = generator.random((3, 80))
        original = [(row < 0.6).astype(float) for row in hard]
        other = [(row < 0.5).astype(float) for row in hard]
        low, high = drop_interval(original, other)
        held += low <= 10 <= high
    assert 85 <= held <= 100


def test_pairs_are_narrower_than_strangers() -> None:
    """Control: the same scores in another order are no pairs, and the interval says so."""
    generator = numpy.random.default_rng(2)
    hard = generator.random(200)
    original, other = (hard < 0.6).astype(float), (hard < 0.5).astype(float)
    low, high = drop_interval([original], [other])
    apart_low, apart_high = drop_interval([original], [generator.permutation(other)])
    assert high - low < 0.6 * (apart_high - apart_low)


def test_the_same_numbers_give_the_same_interval() -> None:
    scores = [[0.0, 1.0, 1.0, 0.5]], [[0.0, 0.0, 1.0, 0.5]]
    assert drop_interval(*scores) == drop_interval(*scores)
    assert drop_interval(scores[0], scores[0]) == [0.0, 0.0] and drop_interval([], []) is None
