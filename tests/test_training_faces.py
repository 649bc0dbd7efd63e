"""mini's face models: alignment, export, and what the shipped detector and recognisers do in insightface."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from idgen.training.facedata import FaceSet, align, jitter_keypoints, similarity
from idgen.training.heads import identity_parameters, render, sample_nuisances, sample_people

FACES = Path(__file__).parent.parent / "weights" / "mini" / "faces"
READER = Path(__file__).parent.parent / "benchmarks" / "mini_attributes.safetensors"
EXPRESSIONS = Path(__file__).parent.parent / "benchmarks" / "mini_expression.safetensors"
SEED = 4_000_000
"""People of no split: neither trained on nor benchmarked."""


@cache
def few(people: int = 6, each: int = 3) -> FaceSet:
    """Some people in the photo style; the first picture of each is frontal and bare."""
    latents = sample_people(people, SEED)
    n = people * each
    labels = sample_nuisances(n, SEED, style="photo").labels
    for name in ("pose", "glasses", "hat"):
        labels[name][::each] = 0
    out = render(latents.repeat_interleave(each, 0), sample_nuisances(n, SEED, **labels))
    return FaceSet(
        images=(out.images * 255).round().to(torch.uint8),
        keypoints=out.keypoints,
        boxes=out.boxes,
        person=torch.arange(n) // each,
        style=labels["style"],
        parameters=identity_parameters(latents),
        attributes=out.attributes,
    )


def bgr(image: torch.Tensor) -> np.ndarray:
    """[3, H, W] uint8 RGB to what insightface takes."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy()[..., ::-1])


def test_align_is_insightfaces_norm_crop() -> None:
    from insightface.utils import face_align

    faces = few()
    crops = align(faces.images, faces.keypoints)
    assert crops.shape == (18, 3, 112, 112)
    for image, points, crop, matrix in zip(faces.images, faces.keypoints, crops, similarity(faces.keypoints)):
        assert np.allclose(matrix.numpy(), face_align.estimate_norm(points.numpy()), atol=1e-3)
        theirs = face_align.norm_crop(bgr(image), points.numpy())[..., ::-1]
        ours = ((crop + 1) * 127.5).permute(1, 2, 0).numpy()
        assert np.abs(theirs - ours).mean() < 0.6  # cv2 interpolates in steps of 1/32 pixel


def test_jitter_is_a_share_of_the_faces_size() -> None:
    torch.manual_seed(0)
    points = few().keypoints[:1].expand(2000, -1, -1)
    small = float((jitter_keypoints(points) - points).norm(dim=-1).mean())
    large = float((jitter_keypoints(points * 3) - points * 3).norm(dim=-1).mean())
    assert 0.5 < small < 2.5
    assert large == pytest.approx(3 * small, rel=0.1)


def test_scenes_know_where_their_heads_are() -> None:
    from idgen.training.scenes import Clutter, compose

    torch.manual_seed(0)
    faces = few()
    scene = compose(faces, Clutter(faces, n=32, size=64), 24, 128)
    assert scene.images.shape == (24, 3, 128, 128)
    assert scene.images.min() >= 0 and scene.images.max() <= 1
    heads = scene.present.sum(1)
    assert (heads == 0).any() and (heads > 1).any()
    middle = scene.keypoints[scene.present].mean(1)
    box = scene.boxes[scene.present]
    assert ((middle > box[:, :2]) & (middle < box[:, 2:])).all()


def test_scenes_put_each_keypoint_where_its_feature_is() -> None:
    """Mirrored heads too: the left eye stays left, and drawn-out scenes keep their measures."""
    from idgen.training.scenes import Clutter, compose

    torch.manual_seed(1)
    faces = few()
    marked = replace(faces, images=torch.zeros_like(faces.images))
    for image, points in zip(marked.images, faces.keypoints):
        for x, y in points.round().long().tolist():
            image[:, y - 1 : y + 1, x - 1 : x + 1] = 255
    scene = compose(marked, Clutter(faces, n=32, size=64), 48, 128).enlarged(2)
    size = (scene.boxes[..., 2:] - scene.boxes[..., :2]).max(-1).values
    seen = []
    for i, slot in (scene.present & (size > 100) & (size < 160)).nonzero().tolist():
        left, right, _, mouth_left, mouth_right = scene.keypoints[i, slot]
        assert left[0] < right[0] and mouth_left[0] < mouth_right[0]
        for x, y in scene.keypoints[i, slot].round().long().tolist():
            if 8 <= x < 248 and 8 <= y < 248:
                near = scene.images[i].mean(0)[y - 8 : y + 9, x - 8 : x + 9]
                seen.append(near[5:12, 5:12].max() > near.median() + 0.1)
    assert len(seen) > 60
    assert sum(seen) > 0.8 * len(seen)  # some are covered, or blurred away


def test_each_stride_counts_once_in_the_detectors_loss() -> None:
    """A large head covers many cells of the coarse stride, small ones few of the fine; neither outvotes the other."""
    from idgen.training.detector import ANCHORS, STRIDES, loss_of
    from idgen.training.scenes import MOST, Scene

    boxes, keypoints = torch.zeros(2, MOST, 4), torch.zeros(2, MOST, 5, 2)
    present = torch.zeros(2, MOST, dtype=torch.bool)
    for i, side in enumerate((20.0, 480.0)):
        boxes[i, 0] = torch.tensor([320 - side / 2, 320 - side / 2, 320 + side / 2, 320 + side / 2])
        keypoints[i, 0] = 320
        present[i, 0] = True
    scene = Scene(torch.zeros(2, 3, 640, 640), keypoints, boxes, present)
    maps = [torch.zeros(2, ANCHORS * 15, 640 // s, 640 // s) for s in STRIDES]
    found = {}
    for off in (0, 2):
        # One stride predicts its head's keypoints half a head away; the others are right.
        for out, stride in zip(maps, STRIDES):
            down = torch.arange(640 // stride) * float(stride)
            y, x = torch.meshgrid(down, down, indexing="ij")
            out[:, 2 + 4 * ANCHORS :] = torch.stack([320 - x, 320 - y], 0).repeat(5 * ANCHORS, 1, 1) / stride
        maps[off][:, 2 + 4 * ANCHORS :] += (20.0, 0.0, 480.0)[off] / 2 / STRIDES[off]
        found[off] = float(loss_of(tuple(maps), scene)[2])
    assert found[0] == pytest.approx(found[2], rel=1e-4) == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("kind", ["recogniser", "scorer"])
def test_exported_recogniser_is_the_torch_one(kind: str, tmp_path: Path) -> None:
    from insightface.model_zoo import get_model

    from idgen.training.export import export_recogniser
    from idgen.training.recogniser import ARCHITECTURES, embed

    torch.manual_seed(0)
    net = ARCHITECTURES[kind]()
    net(torch.randn(16, 3, 112, 112))  # batch norm statistics that are not the initial ones
    net.eval()
    path = tmp_path / "net.onnx"
    export_recogniser(net, path)
    model = get_model(str(path), providers=["CPUExecutionProvider"])
    assert model.taskname == "recognition"
    assert (model.input_mean, model.input_std) == (127.5, 127.5)
    faces = few()
    ours = embed(net, faces.images[:4], faces.keypoints[:4])
    crops = (align(faces.images[:4], faces.keypoints[:4]) * 127.5 + 127.5).round().clamp(0, 255).byte()
    theirs = torch.from_numpy(model.get_feat([bgr(c) for c in crops]))
    assert F.cosine_similarity(ours, theirs).min() > 0.999


def test_exported_detector_is_the_torch_one_at_any_size(tmp_path: Path) -> None:
    import onnxruntime

    from idgen.training.detector import Detector
    from idgen.training.export import export_detector

    torch.manual_seed(0)
    net = Detector()
    net(torch.randn(4, 3, 128, 128))
    net.eval()
    path = tmp_path / "detector.onnx"
    export_detector(net, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for high, wide in ((128, 128), (96, 160), (320, 320)):
        image = torch.randn(1, 3, high, wide)
        with torch.no_grad():
            ours = net(image)
        theirs = session.run(None, {"input": image.numpy()})
        assert [tuple(t.shape) for t in ours] == [t.shape for t in theirs]
        assert ours[0].shape == (high // 8 * (wide // 8) * 2, 1)
        for a, b in zip(ours, theirs):
            assert np.allclose(a.numpy(), b, atol=2e-2 * max(1.0, float(a.abs().max())))


def test_training_runs_and_its_checkpoints_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from idgen.training import attributes, detector, recogniser, scenes

    faces = few()
    net = recogniser.train(faces, "scorer", minutes=0.005, out=tmp_path / "scorer.pt", batch=8)
    again = recogniser.load_recogniser(tmp_path / "scorer.pt")
    crops = align(faces.images[:2], faces.keypoints[:2])
    assert torch.allclose(net(crops), again(crops), atol=1e-3)  # other memory layouts, other sums
    going_on = recogniser.train(faces, "scorer", minutes=0.002, start=tmp_path / "scorer.pt", batch=8)
    assert not going_on.training
    reader = attributes.train(faces, minutes=0.005, out=tmp_path / "reader.safetensors", batch=8)
    loaded = attributes.load_reader(tmp_path / "reader.safetensors")
    images = faces.images[:3].float() / 255
    for name, values in reader(images).items():
        assert torch.allclose(values, loaded(images)[name], atol=0.05)
    monkeypatch.setattr(detector, "Clutter", partial(scenes.Clutter, n=32, size=64))
    detector.train(faces, minutes=0.001, out=tmp_path / "detector.pt")
    assert not detector.load_detector(tmp_path / "detector.pt").training
    torch.save({}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt holds other layers"):
        detector.load_detector(tmp_path / "other.pt")
    found = detector.best_faces(detector.Detector().eval(), faces.images)
    assert [tuple(t.shape) for t in found] == [(18,), (18, 4), (18, 5, 2)]


@cache
def analysis():  # type: ignore[no-untyped-def]
    """insightface's own application on mini's pack."""
    from insightface.app import FaceAnalysis

    return FaceAnalysis(name=str(FACES / "mini"), providers=["CPUExecutionProvider"])


def test_insightface_takes_the_pack_for_what_it_is() -> None:
    models = analysis().models
    assert {k: type(m).__name__ for k, m in models.items()} == {"detection": "SCRFD", "recognition": "ArcFaceONNX"}
    assert (models["recognition"].input_mean, models["recognition"].input_std) == (127.5, 127.5)
    assert models["detection"].static_input_size is None
    assert sum(f.stat().st_size for f in FACES.rglob("*.onnx")) < 6e6


@pytest.mark.parametrize("size", [128, 256, 320, 640])
def test_every_head_is_found_at_every_size(size: int) -> None:
    faces = few()
    analysis().prepare(ctx_id=-1, det_size=(size, size))
    errors = []
    for image, points in zip(faces.images, faces.keypoints):
        found = analysis().get(bgr(image))
        assert len(found) == 1
        errors.append(np.linalg.norm(found[0].kps - points.numpy(), axis=1).mean())
    # Pixels of 128. Measured means are 1.8 at size 128 and 2.1 at 640, where the upscaled head is the hardest case.
    assert np.mean(errors) < 2.7
    assert max(errors) < 10


def test_several_heads_are_counted_and_noise_is_nobody() -> None:
    faces = few()
    analysis().prepare(ctx_id=-1, det_size=(320, 320))
    row = np.concatenate([bgr(faces.images[i]) for i in (0, 3, 6)], 1)
    assert len(analysis().get(row)) == 3
    noise = np.random.default_rng(0)
    for size in (4, 16, 64, 128):
        small = Image.fromarray(noise.integers(0, 256, (size, size, 3), dtype=np.uint8))
        assert analysis().get(np.asarray(small.resize((128, 128), Image.Resampling.BICUBIC))) == []
    assert analysis().get(np.full((128, 128, 3), 127, np.uint8)) == []
    assert analysis().get(bgr(faces.images[0])[:30]) == []  # hair and background


@pytest.mark.parametrize("recogniser", [None, FACES / "scorer" / "scorer.onnx"])
def test_people_are_told_apart(recogniser: Path | None) -> None:
    from idgen.faces import FaceExtractor

    faces = few()
    extractor = FaceExtractor(FACES / "mini", recogniser, device="cpu")
    normed = [extractor.face(Image.fromarray(i.permute(1, 2, 0).numpy())).normed for i in faces.images]
    unit = torch.from_numpy(np.stack(normed))
    cosine = unit @ unit.T
    same = faces.person[:, None] == faces.person[None]
    different = cosine[~same]
    same.fill_diagonal_(False)
    assert cosine[same].mean() > 0.55
    assert different.mean() < 0.2
    nearest = cosine.clone().fill_diagonal_(-1).argmax(1)
    assert (faces.person[nearest] == faces.person).float().mean() > 0.9


def test_attributes_are_read() -> None:
    from idgen.training.attributes import accuracy, load_reader

    found = accuracy(load_reader(READER), few())
    assert min(found[k] for k in ("background", "shirt", "glasses", "hat")) > 0.9
    assert min(found[k] for k in ("expression", "pose")) > 0.7


def test_expressions_are_read_off_aligned_faces() -> None:
    from idgen.training.expression import load_judge
    from idgen.training.facedata import align

    faces = few()
    found = load_judge(EXPRESSIONS)(align(faces.images.float(), faces.keypoints)).argmax(1)
    assert (found == faces.attributes["expression"]).float().mean() > 0.9
