"""Every stage of the training runs: a few steps on a handful of people, tokenizers on any text, files in their
formats.
"""

from __future__ import annotations

import random

import pytest
import torch

from idgen.training import data
from idgen.training.captions import CLASSES, random_caption
from idgen.training.heads import sample_nuisances, sample_people
from idgen.training.optim import Optimiser, orthogonalise
from idgen.training.text import END, TextEncoders, random_captions, write_tokenizer
from idgen.training.workers import Workers

STEPS = 0.004  # minutes: a few steps


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_tokenizer_keeps_our_words_whole(tokenizer):
    for word in ("red", "glasses", "smiling", "background", "person", "id"):
        assert len(tokenizer(word).input_ids) == 3


@pytest.mark.parametrize("text", ["Zürich, 2024!", "你好", "😀 emoji", "", "   ", "supercalifragilistic", "\x00\n\t"])
def test_tokenizer_encodes_any_text(tokenizer, text):
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=40).input_ids
    assert len(ids) == 40 and max(ids) < len(tokenizer)
    assert tokenizer.eos_token == END and tokenizer.eos_token_id != 2
    whole = tokenizer(text).input_ids[1:-1]
    assert tokenizer.unk_token_id not in whole or tokenizer.unk_token_id == tokenizer.eos_token_id
    assert (len(whole) > 0) == bool(text.strip(" \n\t"))


def test_captions_say_what_they_say():
    labels = sample_nuisances(50, 3).labels
    rng = random.Random(1)
    for i in range(50):
        text, meaning = random_caption(labels, i, rng)
        for name, index in meaning.items():
            assert index in (int(labels[name][i]), CLASSES[name] - 1)
        if meaning["glasses"] == 1:
            assert "glasses" in text


def test_orthogonalise_evens_out_singular_values():
    torch.manual_seed(0)
    for shape in ((16, 64), (64, 16)):
        s = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert s.min() > 0.5 and s.max() < 1.4


def test_optimiser_learns_and_resumes():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    optimiser = Optimiser(net.parameters(), Workers())
    x, y = torch.randn(64, 16), torch.randn(64, 16)
    losses = []
    for _ in range(60):
        loss = (net(x) - y).pow(2).mean()
        loss.backward()
        optimiser.step(1e-2)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    other = Optimiser(net.parameters(), Workers())
    other.load_state_dict(optimiser.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.momentum, optimiser.momentum))


def test_splits_never_share_people():
    seeds = list(data.SPLIT_SEEDS.values())
    assert all(abs(a - b) >= 100_000 for i, a in enumerate(seeds) for b in seeds[i + 1 :])
    people = [sample_people(5, s) for s in seeds]
    assert not any(torch.equal(a, b) for i, a in enumerate(people) for b in people[i + 1 :])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A run folder with 6 people, as the stages would have left it."""
    from idgen.training import autoencoder as ae
    from idgen.training.latents import make
    from idgen.training.recogniser import Recogniser

    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHARD_PEOPLE", 3)
        for split in ("train", "validation"):
            data.write_shard(data.render_shard(split, 0, batch=12), data.shard_path(root / "shards", split, 0))
    torch.manual_seed(0)
    make(root / "shards", root / "latents", ae.build(ae.AutoencoderSize(8, 8)).eval(), Recogniser().eval())
    return root


def test_autoencoder_trains_and_folds(folder):
    from idgen.training import autoencoder as ae

    shards = data.load(folder / "shards", "train")
    size = ae.AutoencoderSize(16, 16, (0, 0, 1, 1), (1, 1, 0, 0))
    model = ae.train(shards, shards, folder, STEPS, size=size, batch=4)
    assert (folder / "autoencoder" / "config.json").exists()
    assert ae.encode(model, shards.images[:2]).shape == (2, 8, 16, 16)
    decoder = ae.train(
        shards, shards, folder, STEPS, batch=4, decoder_only=True, start=folder / "autoencoder", name="decoder"
    )
    for a, b in zip(model.encoder.parameters(), decoder.encoder.parameters()):
        assert torch.equal(a, b)


def test_fold_changes_nothing():
    from idgen.training import autoencoder as ae

    torch.manual_seed(1)
    model, norm = ae.build(ae.AutoencoderSize(8, 8, (0, 0, 0, 1), (1, 0, 0, 0))), ae.LatentNorm()
    norm.mean.normal_()
    norm.var.uniform_(0.5, 2)
    norm.eval()
    x = torch.randn(2, 3, 32, 32)
    before = norm(model.encode(x).latents)
    ae.fold(model, norm)
    assert torch.allclose(before, norm(model.encode(x).latents), atol=1e-4)


def test_generator_and_its_adapters_train(folder, tokenizer):
    """One after the other, as the stages do, and each comes out in its format."""
    from idgen.adapters.projections import build_projection
    from idgen.training import arc2face, face_image, generator, instantid, latent_reader, projector
    from idgen.training import autoencoder as ae
    from idgen.training.expression import ExpressionReader
    from idgen.training.face_teacher import FaceTeacher
    from idgen.training.latents import LatentSet
    from idgen.training.recogniser import Recogniser

    people, words = LatentSet(folder / "latents", "train"), TextEncoders(tokenizer).eval()
    vae = ae.build(ae.AutoencoderSize(8, 8, (0, 0, 0, 1), (1, 0, 0, 0))).eval()
    reader = latent_reader.train(people, people, folder, STEPS, batch=4)
    start = projector.FaceIdProjector()
    projector.pretrain(start, people.centres, people.parameters, folder, STEPS, batch=4)
    teacher = FaceTeacher(vae, Recogniser().eval(), ExpressionReader().eval())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "look", lambda *_: {})
        model = generator.train(
            people,
            people,
            words,
            start,
            vae,
            folder,
            STEPS,
            batch=4,
            find_reader=lambda: reader,
            reader_from=0,
            face_teacher=teacher,
        )
    assert "1.to_k_ip.weight" in model.keys.tensors()
    project = {k: v.detach() for k, v in model.projector.state_dict().items()}
    e = people.centres[:2]
    assert torch.allclose(build_projection(project)(e), model.projector(e), atol=1e-5)

    face = face_image.train(
        people,
        data.load(folder / "shards", "train"),
        people,
        data.load(folder / "shards", "train"),
        model.projector,
        folder,
        STEPS,
        batch=2,
    )
    refine = {f"perceiver_resampler.{k}": v for k, v in face.perceiver.state_dict().items()}
    build_projection({**project, **refine})

    resampler = instantid.train_resampler(people, people, model.projector, folder, STEPS, batch=4)
    build_projection(resampler.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instantid, "sample", lambda *a, **k: torch.zeros(18, 8, 16, 16))
        net = instantid.train_identity_net(people, people, words, model, resampler, vae, folder, STEPS, batch=4)
    assert net.config.conditioning_channels == 3

    encoders = arc2face.pretrain_encoders(people, words, model, folder, STEPS, batch=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arc2face, "sample_faces", lambda *a, **k: torch.zeros(24, 8, 16, 16))
        unet, _, _ = arc2face.train(people, people, words, model, vae, folder, STEPS, batch=4, encoders=encoders)
    assert unet.config.cross_attention_dim == 512


def test_face_teacher_pulls_only_on_rows_that_show_a_face_and_say_something(folder):
    from idgen.training import autoencoder as ae
    from idgen.training.expression import ExpressionReader
    from idgen.training.face_teacher import LATEST, FaceTeacher
    from idgen.training.latents import LatentSet
    from idgen.training.recogniser import Recogniser

    torch.manual_seed(0)
    people = LatentSet(folder / "latents", "train")
    vae = ae.build(ae.AutoencoderSize(8, 8, (0, 0, 0, 1), (1, 0, 0, 0))).eval()
    teacher = FaceTeacher(vae, Recogniser().eval(), ExpressionReader().eval())
    rows = people.photo.nonzero().flatten()[:8]
    a, said, nobody = torch.ones(8, 1, 1, 1), torch.ones(8), torch.zeros(8, dtype=torch.bool)
    t = torch.tensor([100, LATEST, 10, 999, LATEST, 10, 999, LATEST])

    def pull(said, nobody):
        clean = people.latents[rows].float().requires_grad_()
        teacher(clean, a, t, rows, said, nobody, people)[0].backward()
        return clean.grad.abs().sum((1, 2, 3))

    both = pull(said, nobody)
    assert both[0] > 0 and not both[1:].any()
    assert pull(torch.zeros(8), nobody)[0] > 0 and pull(said, ~nobody)[0] > 0
    assert not pull(torch.zeros(8), ~nobody).any()


def test_expression_reader_trains_and_is_read_back(folder):
    from idgen.training import expression
    from idgen.training.facedata import FaceSet

    faces = FaceSet.read(folder / "shards", "train")
    reader = expression.train(faces, faces, folder, STEPS, batch=8)
    torch.save(reader.state_dict(), folder / "expression_final.pt")
    crops = torch.randn(3, 3, 112, 112)
    again = expression.load_expression_reader(folder / "expression_final.pt")
    assert torch.allclose(reader(crops), again(crops), atol=1e-5)


def test_interrupted_training_goes_on(folder):
    """A second run with a larger budget takes up samples and time where the first one stopped."""
    from idgen.training import latent_reader
    from idgen.training.latents import LatentSet

    people = LatentSet(folder / "latents", "train")
    latent_reader.train(people, people, folder / "again", STEPS, batch=4)
    first = torch.load(folder / "again" / "reader.pt", weights_only=True)
    latent_reader.train(people, people, folder / "again", 3 * STEPS, batch=4)
    second = torch.load(folder / "again" / "reader.pt", weights_only=True)
    assert second["samples"] > first["samples"] and second["spent"] > first["spent"]


def test_random_captions_are_repeatable():
    assert random_captions(5, 1)[0] == random_captions(5, 1)[0]


def test_a_stage_runs_until_its_result_is_there_and_then_never_again(tmp_path, monkeypatch):
    """Interrupted, it leaves no result and starts again; `data` completes what is missing, so it always runs."""
    from idgen.training import stages
    from idgen.training.run import Run

    seen = []

    def work(run):
        seen.append(run.minutes)
        if run.minutes < 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(stages, "STAGES", {n: stages.Stage(work, f"{n}.done", 0.5) for n in ("generator", "data")})
    with pytest.raises(KeyboardInterrupt):
        stages.run_stage("generator", Run(tmp_path, minutes=0.5), [])
    for minutes in (3, 4):
        stages.run_stage("generator", Run(tmp_path, minutes=minutes), [])
        stages.run_stage("data", Run(tmp_path, minutes=10 * minutes), [])
    assert seen == [0.5, 3, 30, 40]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generator"], "generator needs text, projector, reader, expression, faces, not done in"),
        (["latents"], "latents needs faces, autoencoder, not done in"),
        (["export"], "export needs generator, text, autoencoder, not done in"),
        (["text", "--minutes", "0"], "--minutes must be above 0"),
        (["text", "--root", "FILE/run"], "FILE/run: Not a directory"),
    ],
)
def test_a_wrong_command_is_one_line_and_leaves_nothing(arguments, said, tmp_path, monkeypatch, capsys):
    from idgen.training.__main__ import main

    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["idgen.training", "--root", "run", *arguments])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2 and said in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["FILE"]


def test_every_stage_comes_after_those_that_it_needs():
    from idgen.training.stages import STAGES

    order = list(STAGES)
    for name, stage in STAGES.items():
        assert all(order.index(other) < order.index(name) for other in stage.needs), name


def test_stages_find_what_earlier_ones_left(folder):
    from idgen.training.artefacts import latent_sets, load_reader
    from idgen.training.run import Run

    people, held_out = latent_sets(Run(folder))
    assert not torch.equal(people.parameters, held_out.parameters)
    assert load_reader(Run(folder)) is None
