"""The renderer of synthetic heads: deterministic, and its landmarks, masks and captions tell the truth."""

from __future__ import annotations

import pytest
import torch

from idgen.training.heads import (
    ATTRIBUTES,
    COLOURS,
    DIMENSIONS,
    PARAMETERS,
    STYLES,
    describe,
    identity_parameters,
    render,
    sample_nuisances,
    sample_people,
)

PLAIN = {"pose": "front", "expression": "neutral", "light": "soft", "style": "photo", "glasses": 0, "hat": 0}


@pytest.fixture(scope="module")
def pictures():
    people = sample_people(4, 11)
    return people, render(people, sample_nuisances(4, 12, jitter=0.5, **PLAIN, background="blue", shirt="red"))


def test_same_seed_same_picture(pictures):
    people, first = pictures
    assert torch.equal(people, sample_people(4, 11))
    again = render(people, sample_nuisances(4, 12, jitter=0.5, **PLAIN, background="blue", shirt="red"))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(sample_people(4, 11), sample_people(4, 12))


def test_shapes_and_ranges(pictures):
    people, r = pictures
    assert people.shape == (4, DIMENSIONS)
    assert r.images.shape == (4, 3, 128, 128) and r.images.min() >= 0 and r.images.max() <= 1
    assert r.keypoints.shape == (4, 5, 2) and r.boxes.shape == (4, 4) and r.masks.shape == (4, 1, 128, 128)
    assert identity_parameters(people).shape == (4, len(PARAMETERS))
    assert set(r.attributes) == set(ATTRIBUTES)


def test_keypoints_lie_on_the_features_they_name(pictures):
    """The eyes' centres show the dark pupil; the picture's left eye is on the left; the face mask covers the nose."""
    _, r = pictures
    for image, points, box, mask in zip(r.images, r.keypoints, r.boxes, r.masks):
        left, right, nose, mouth_left, mouth_right = points
        assert left[0] < nose[0] < right[0] and mouth_left[0] < mouth_right[0]
        assert max(left[1], right[1]) < nose[1] < min(mouth_left[1], mouth_right[1])
        assert box[0] < left[0] and right[0] < box[2] and box[1] < left[1] and mouth_left[1] < box[3]
        for x, y in (left, right):
            x, y = int(x), int(y)
            darkest = image[:, y - 3 : y + 4, x - 3 : x + 4].mean(0).min()
            assert darkest < 0.25  # the pupil
        assert mask[0, int(nose[1]), int(nose[0])] > 0.9
        assert mask[0, 0, 0] == 0 and mask[0, 127, 64] == 0


def test_landmarks_follow_the_pose():
    people = sample_people(2, 3)
    left, right = (
        render(people, sample_nuisances(2, 1, jitter=0, **{**PLAIN, "pose": pose})) for pose in ("left", "right")
    )
    offset = [(r.keypoints[:, 2, 0] - r.keypoints[:, :2, 0].mean(1)).mean() for r in (left, right)]
    assert offset[0] < -3 < 3 < offset[1]


def test_colours_are_those_of_the_caption(pictures):
    _, r = pictures
    background = r.images[:, :, 60, 2]
    assert (background.argmax(1) == 2).all()  # blue
    assert (r.images[:, :, 126, 64].argmax(1) == 0).all()  # a red shirt
    assert all("red shirt" in c and "blue background" in c for c in r.captions)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_renders(style):
    r = render(sample_people(1, 5), sample_nuisances(1, 6, style=style, hat=1, glasses=1), size=64)
    assert torch.isfinite(r.images).all() and r.images.std() > 0.05
    assert ("hat" in r.captions[0]) and ("glasses" in r.captions[0])
    if style == "sketch":
        assert not any(colour in r.captions[0] for colour in COLOURS)


def test_unknown_attribute_is_refused():
    with pytest.raises(ValueError, match="unknown attribute 'moood'"):
        sample_nuisances(1, 1, moood="happy")
    with pytest.raises(ValueError, match="unknown pose"):
        sample_nuisances(1, 1, pose="backwards")


def test_people_are_varied():
    p = describe(sample_people(2000, 1))
    assert 0.02 < (p["no_hair"] > 0).float().mean() < 0.2
    assert 0.1 < (p["beard"] > 0).float().mean() < 0.35
    luminance = p["skin"].mean(1)
    assert luminance.min() < 0.25 and luminance.max() > 0.75
