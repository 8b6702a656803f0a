"""Sizes of pictures in the words of detectors elsewhere, which bound the sides, and in ours, which counts pixels."""

from __future__ import annotations

from dataclasses import replace

import pytest

from saccade.config import PreprocessingConfig
from saccade.models import DETECTORS
from saccade.weights.descriptions import read_preprocessing
from saccade.weights.formats.detr import edges, side_by_edges


@pytest.mark.parametrize("stride", [16, 32, 64])
def test_bounds_of_sides_there_and_back(stride: int) -> None:
    """Other bounds than the published ones come back as others, but mean as many pixels; that is said."""
    published = PreprocessingConfig(image_size=side_by_edges(800, 1333, stride), stride=stride)
    size = edges("DetrImageProcessor", published)["size"]
    assert (size["shortest_edge"], size["longest_edge"]) == (800, 1333)
    for image_size in range(2 * stride, 1600, stride):
        size = edges("any", PreprocessingConfig(image_size=image_size, stride=stride))["size"]
        assert side_by_edges(size["shortest_edge"], size["longest_edge"], stride) == image_size
        row = replace(DETECTORS["detr_resnet50"], image_size=image_size)
        given = {
            "size": {"shortest_edge": size["shortest_edge"], "longest_edge": size["longest_edge"]},
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        found, notes = read_preprocessing("it", {}, given, row, None)
        assert f"shorter side has {size['shortest_edge']} pixels" in notes[0] and str(found.image_size) in notes[0]
