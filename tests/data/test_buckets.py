from __future__ import annotations

import numpy as np
import pytest

from saccade.config import PreprocessingConfig
from saccade.data.buckets import assign, bucket_shapes, square


@pytest.mark.parametrize("image_size", [4, 28, 32, 64, 100, 128, 224, 518])
@pytest.mark.parametrize("stride", [1, 4, 14, 16, 32])
@pytest.mark.parametrize("max_aspect", [1.0, 2.0, 4.0])
def test_shapes(image_size, stride, max_aspect):
    preprocessing = PreprocessingConfig(image_size=image_size, stride=stride, max_aspect=max_aspect)
    shapes = bucket_shapes(preprocessing)
    side = square(preprocessing)[0]
    assert (side, side) in shapes and len(set(shapes)) == len(shapes)
    assert shapes == sorted(shapes, key=lambda s: s[1] / s[0])
    assert {(w, h) for h, w in shapes} == set(shapes)
    for h, w in shapes:
        assert h % stride == w % stride == 0
        assert 1 / max_aspect - 1e-6 <= w / h <= max_aspect + 1e-6
        assert abs(h * w / side**2 - 1) <= 0.125


def test_square_only_and_smaller_than_the_stride():
    assert bucket_shapes(PreprocessingConfig(image_size=64, max_aspect=1)) == [(64, 64)]
    assert bucket_shapes(PreprocessingConfig(image_size=4, stride=32)) == [(32, 32)]
    assert bucket_shapes(PreprocessingConfig(image_size=224, stride=16))[0] == (320, 160)


def test_nearest_aspect():
    shapes = [(40, 20), (32, 32), (20, 40)]
    sizes = np.array([[100, 100], [100, 1000], [1000, 90], [100, 139], [100, 143], [0, 0], [30, 40000]])
    assert assign(sizes, shapes).tolist() == [1, 2, 0, 1, 2, 1, 2]
