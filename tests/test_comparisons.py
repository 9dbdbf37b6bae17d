"""The difference between a printed number and ours."""

import pytest

from experiments.comparisons import Comparison


@pytest.mark.parametrize(
    ("paper", "ours", "difference"),
    [
        (4.0, 5.0, 0.25),
        (4.0, 3.0, -0.25),
        ((1.7, 2.7), 2.0, 0.0),
        ((2.0, 4.0), 1.0, -0.5),
        ((2.0, 4.0), 5.0, 0.25),
        (0.0, 0.0, 0.0),
        (0.0, 0.1, None),
        (None, 3.0, None),
    ],
)
def test_difference_is_relative_to_the_nearest_number_of_theirs(paper, ours, difference):
    assert Comparison("what", paper, ours).difference == difference
