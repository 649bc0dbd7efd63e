"""The demo without a browser: what it knows and does, and its endpoints for programs."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from idgen.demo import panels, prompts
from idgen.demo.limits import Limits
from idgen.demo.offers import offers
from idgen.demo.orders import Settings, look, make_request, person, variation
from idgen.demo.people import Sitting
from idgen.demo.session import KEPT, Session, Shot
from idgen.demo.styles import SIZES, pixels, styles
from idgen.engine import Engine
from idgen.errors import BadImage, BadRequest, NoFaceFound
from idgen.portrait import Portrait, read_metadata
from idgen.request import Request
from idgen.weights.store import Store
from tests import tiny
from tests.demo_site import PEOPLE, Site, site

PIPELINE = "ip-adapter-faceid-plusv2"


@pytest.fixture(scope="module")
def extractor() -> Any:
    from idgen.api import default_extractor

    return default_extractor()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(tiny.shared) as engine:
        yield engine


def portrait(seed: int = 1) -> Portrait:
    return Portrait(Image.new("RGB", (64, 80)), seed, 0.5, None, {"request": {"pipeline": PIPELINE, "prompt": "x"}})


def offer(name: str = PIPELINE) -> Any:
    return next(each for each in offers(ready=[PIPELINE, "instantid", "text-to-image"]) if each.name == name)


def settings(**changes: Any) -> Settings:
    plain = Settings("a hat", "None", PIPELINE, 2, "Pipeline's own", 3, 4.0, 0.9, 0.8, "", "default", False, 7, None)
    return Settings(**{**plain.__dict__, **changes})


def test_styles_are_data_and_keep_the_users_words() -> None:
    assert len(styles()) > 12
    assert styles()["None"].apply("  two {braces}  ", "") == ("two {braces}", None)
    assert styles()["None"].apply("", " ") == (None, None)
    for style in list(styles().values())[1:]:
        prompt, negative = style.apply("Ada {x}", "blur")
        assert prompt and "Ada {x}" in prompt and "{prompt}" not in prompt
        assert negative and negative.startswith("blur")
        assert "a person" in (style.apply("", "")[0] or "")


@pytest.mark.parametrize("side", [128, 512, 1024])
def test_size_presets_keep_ratio_and_area(side: int) -> None:
    for label, ratio in SIZES.items():
        size = pixels(label, side)
        if ratio is None:
            assert size is None
            continue
        assert size is not None and size[0] % 8 == size[1] % 8 == 0
        assert size[0] / size[1] == pytest.approx(ratio[0] / ratio[1], rel=0.16)
        assert size[0] * size[1] == pytest.approx(side * side, rel=0.16)


def test_offers_say_what_is_lacking() -> None:
    made = offers(ready=[PIPELINE])
    assert made[0].name == PIPELINE and made[0].ready and not made[0].lacking
    lacking = next(each for each in made if each.name == "ip-adapter-plus")
    assert not lacking.ready and "ip-adapter-plus" in lacking.cure and lacking.cure.startswith("idgen weights pull")
    assert not next(each for each in made if each.name == "text-to-image").wants_person
    assert not next(each for each in made if each.name == "arc2face").takes_prompt
    html = panels.missing(made)
    assert PIPELINE + "<" not in html and "idgen weights pull" in html


def test_the_picked_face_is_the_only_one_left(extractor: Any) -> None:
    sitting = Sitting.open(str(PEOPLE / "friends.jpg"), extractor, Limits())
    assert len(sitting.faces) == 3
    drawn = sitting.drawn()
    for index, face in enumerate(sitting.faces):
        x, y = (face.box[:2] + face.box[2:]) / 2
        scale = drawn.width / sitting.photo.width
        assert sitting.pick_at(x * scale, y * scale) and sitting.pick == index
        left = extractor.faces(sitting.portrait())
        assert len(left) == 1 and float(left[0].normed @ face.normed) > 0.9
    assert not sitting.pick_at(0, 0)


def test_looking_again_keeps_the_pick(extractor: Any, tmp_path: Path) -> None:
    session, photo = Session(), shutil.copy(PEOPLE / "friends.jpg", tmp_path)
    look(session, [(photo, None)], extractor, Limits())
    session.sittings[0].pick = 2
    look(session, [(photo, None), str(PEOPLE / "ada.jpg")], extractor, Limits())
    assert [each.pick for each in session.sittings] == [2, 0]
    (tmp_path / "no.png").write_bytes(b"no image")
    with pytest.raises(BadImage):
        look(session, [str(tmp_path / "no.png")], extractor, Limits())


def test_requests_from_the_page(extractor: Any, engine: Engine) -> None:
    with pytest.raises(BadRequest, match="needs a photo"):
        make_request([], offer(), engine, settings())
    sittings = [Sitting.open(str(PEOPLE / "ada.jpg"), extractor, Limits())]
    request = make_request(sittings, offer(), engine, settings(style="Oil painting", size="Portrait 3:4"))
    assert request.prompt and request.prompt.startswith("an oil painting of a hat")
    assert (request.seed, request.n, request.steps, request.scheduler) == (7, 2, 3, None)
    assert request.width and request.height and request.width < request.height
    random = [make_request(sittings, offer(), engine, settings(random_seed=True)).seed for _ in range(3)]
    assert len(set(random)) > 1
    posed = settings(pose="pose.png", pipeline="instantid")
    assert make_request(sittings, offer("instantid"), engine, posed).pose == "pose.png"
    assert make_request(sittings, offer(), engine, posed).pose is None
    with pytest.raises(BadRequest, match="idgen weights pull"):
        make_request(sittings, offer("ip-adapter-plus"), engine, settings())


def test_photos_without_a_face(extractor: Any) -> None:
    wall = Sitting("wall.png", Image.new("RGB", (64, 64)), problem="no face found. Use another.")
    with pytest.raises(NoFaceFound, match="no face found"):
        person([wall], offer())
    ada = Sitting.open(str(PEOPLE / "ada.jpg"), extractor, Limits())
    assert person([wall, ada], offer()) is ada.photo
    assert person([wall], offer("text-to-image")) is None


def test_sessions_share_nothing_and_leave_nothing() -> None:
    first = Session()
    second = copy.deepcopy(first)
    (shot,) = first.keep([portrait()], Request.create(pipeline=PIPELINE, seed=1), 1.0)
    assert read_metadata(first.path(shot))["seed"] == 1
    assert second.shots == [] and copy.deepcopy(first).shots == []
    folder = first.folder
    assert list(folder.glob("*.png")) and second.folder != folder
    first.leave()
    assert not folder.exists() and len(first.shots) == 1
    assert Path(first.path(shot)).is_file(), "a page that comes back finds its portraits"
    folder = first.folder
    first.close()
    assert first.shots == [] and first.cancelled and not folder.exists()
    second.close()


def test_old_portraits_are_forgotten() -> None:
    session = Session()
    request = Request.create(pipeline=PIPELINE, seed=0)
    for seed in range(KEPT + 3):
        for shot in session.keep([portrait(seed)], request, 1.0):
            session.path(shot)
    assert len(session.shots) == KEPT and session.shots[0].portrait.seed == 3
    assert len(list(session.folder.glob("*.png"))) == KEPT
    session.close()


def test_cancel_reaches_jobs_that_come_later() -> None:
    class Job:
        cancelled = False

        def cancel(self) -> None:
            self.cancelled = True

    session, early, late = Session(), Job(), Job()
    session.watch(early)
    session.cancel()
    session.watch(late)
    assert early.cancelled and late.cancelled
    session.begin()
    assert not session.cancelled


def test_variations_start_from_the_portrait() -> None:
    shot = Shot(portrait(), Request.create(pipeline=PIPELINE, seed=1), 1.0, "x.png")
    request = variation(shot, 3)
    assert request.image is shot.portrait.image and (request.width, request.height) == (64, 80)
    assert request.n == 3 and 0 < request.strength < 1


def test_what_people_write_is_escaped() -> None:
    evil = "<img src=x onerror=alert(1)>"
    shot = Shot(
        Portrait(Image.new("RGB", (8, 8)), 1, None, evil, {"request": {"prompt": evil, "pipeline": evil}}),
        Request.create(pipeline=PIPELINE, seed=1),
        1.0,
        "x.png",
    )
    record = {"row": 1, "line": 1, "file": None, "error": evil}
    for html in (
        panels.details(shot),
        panels.waiting(evil),
        panels.working(evil, 1, 2, 3),
        panels.finished(evil),
        panels.comparison([(evil, None, None, evil)]),
        panels.rows([record]),
    ):
        assert evil not in html and "&lt;img" in html.lower()


def test_prompt_files_name_uploads_only(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    file = tmp_path / "rows.txt"
    lines = [
        f"a --photo {secret}",
        "b --photo ../secret.png",
        "c --photo https://host/x.png",
        "d",
        "e --pipeline arc2face",
    ]
    file.write_text("\n".join(lines))
    items = prompts.read(str(file), {}, lambda _: tiny.person(), PIPELINE, [PIPELINE], Limits())
    errors = [item.records[0]["error"] if item.records else None for item in items]
    assert all(error and "was not uploaded" in error for error in errors[:3])
    assert errors[3] is None and items[3].request is not None
    assert errors[4] and "cannot run here" in errors[4]
    named = prompts.read(str(file), {"secret.png": str(secret)}, lambda _: None, PIPELINE, [PIPELINE], Limits())
    assert named[0].request is not None and named[0].request.who == str(secret) and named[0].person == "secret"


@pytest.mark.parametrize("text", ["", "# only words\n", "x --n 64\n" * 9, "x\n" * (prompts.MOST + 1)])
def test_prompt_files_that_are_empty_or_too_long(text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text(text)
    with pytest.raises(BadRequest):
        prompts.read(str(tmp_path / "rows.txt"), {}, lambda _: tiny.person(), PIPELINE, [PIPELINE], Limits())


def test_a_batch_through_the_engine(engine: Engine, tmp_path: Path) -> None:
    session, folder = Session(), tmp_path / "out"
    folder.mkdir()
    rows = [f"prompt {i} --seed {i} --size 64x64 --steps 2" for i in range(12)]
    (tmp_path / "rows.txt").write_text("\n".join([*rows, "bad --steps no"]))
    items = prompts.read(str(tmp_path / "rows.txt"), {}, lambda _: tiny.person(), PIPELINE, [PIPELINE], Limits())
    states = list(prompts.render(session, engine, items, folder))
    assert states[-1].done == states[-1].total == 12 and len(states[-1].records) == 13
    assert [item.records[0]["seed"] for item in items[:12]] == list(range(12)), "rows must not be crossed"
    assert prompts.pack(items, folder, "rows").is_file()


def test_a_batch_can_be_cancelled(engine: Engine, tmp_path: Path) -> None:
    session = Session()
    (tmp_path / "rows.txt").write_text("x --size 64x64 --steps 500\n" * 20)
    items = prompts.read(str(tmp_path / "rows.txt"), {}, lambda _: tiny.person(), PIPELINE, [PIPELINE], Limits())
    for number, _ in enumerate(prompts.render(session, engine, items, tmp_path)):
        if number == 1:
            session.cancel()
        assert number < 20
    deadline = time.monotonic() + 10
    while (engine.stats().running or engine.stats().queued) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.stats().running == engine.stats().queued == 0


@pytest.fixture(scope="module")
def server(extractor: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    pytest.importorskip("gradio", reason="no gradio is here: install idgen[demo]")
    with pytest.MonkeyPatch.context() as patch, site(tmp_path_factory.mktemp("demo")) as running:
        patch.setenv("IDGEN_HOME", str(tmp_path_factory.mktemp("home")))
        yield running


def test_gradio_client(server: Site) -> None:
    gradio_client = pytest.importorskip("gradio_client", reason="no gradio is here: install idgen[demo]")
    client = gradio_client.Client(server.url, verbose=False)
    photo = {"image": gradio_client.handle_file(str(PEOPLE / "ada.jpg")), "caption": None}
    result = client.predict(
        photos=[photo],
        prompt="a person smiling",
        count=2,
        steps=2,
        random_seed=False,
        seed=5,
        pose=None,
        api_name="/generate",
    )
    portraits = next(part["value"] for part in result if isinstance(part, dict) and isinstance(part.get("value"), list))
    assert len(portraits) == 2 and all(Path(each["image"]).is_file() for each in portraits)
    assert [each["caption"].split()[-1] for each in portraits] == ["5", "6"]
    assert not list((Store().root / "inputs").glob("*")), "the demo keeps its visitors' faces"
    with pytest.raises(Exception, match="needs a photo"):
        client.predict(photos=[], prompt="x", pipeline="instantid", pose=None, seed=1, api_name="/generate")
    endpoints = set(client.view_api(return_format="dict")["named_endpoints"])
    assert endpoints == {"/generate", "/compare", "/batch"}


def test_the_space_runs_from_a_clone() -> None:
    text = (PEOPLE.parent / "README.md").read_text(encoding="utf-8")
    front = text.split("---")[1]
    assert "sdk: gradio" in front and "app_file: demo/space.py" in front
    # Without the installed package: only the standard library's and the site's paths, and none of idgen's finders.
    code = (
        "import runpy, sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        "sys.path = [p for p in sys.path if 'editable' not in p and p not in ('', ROOT)];"
        "runpy.run_path(ROOT + '/demo/space.py')['prepare'](); import idgen.engine; assert idgen.__path__[-1] == ROOT;"
        "from idgen.demo.app import build; build(idgen.engine.Engine())"
    )
    root = str(PEOPLE.parent.parent)
    subprocess.run([sys.executable, "-c", f"ROOT = {root!r}; {code}"], check=True, cwd=PEOPLE, timeout=100)
