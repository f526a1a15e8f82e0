"""What the contract says of plain values."""

import numpy as np
import pytest

from maml.types import whole


@pytest.mark.parametrize("value", [1, 7, np.int32(3), np.int64(1), np.uint8(2)])
def test_whole_numbers(value):
    assert whole(value, 1)


@pytest.mark.parametrize("value", [0, -1, np.int64(0), 1.0, np.float32(2), True, np.True_, "1", None, np.array([1])])
def test_no_whole_numbers(value):
    assert not whole(value, 1)
