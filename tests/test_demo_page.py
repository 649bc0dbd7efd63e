"""The demo as people meet it: driven in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

pytest.importorskip("gradio", reason="no gradio is here: install idgen[demo]")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright is here: install idgen[dev]")

from idgen.jobs import Job  # noqa: E402
from idgen.portrait import read_metadata  # noqa: E402
from tests.demo_site import PEOPLE, Site, free_port, site  # noqa: E402
from tests.engines import wait_until  # noqa: E402

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
WAIT = 30_000
"""Milliseconds; generous, because tests share their machine."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("demo")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        try:
            started = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        except playwright.Error as error:
            pytest.skip(f"no chromium is here, install your system's package: {error}")
        yield started
        started.close()


class Visit:
    """Opens pages and remembers what their consoles complained of."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser, self.url = browser, url
        self.complaints: list[str] = []
        self.contexts: list[Any] = []

    def __call__(self, width: int = 1440, height: int = 1000) -> Any:
        context = self.browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        context.set_default_timeout(WAIT)
        page = context.new_page()
        page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(self.url)
        page.locator("#generate").wait_for()
        self.contexts.append(context)
        return page


@pytest.fixture
def visit(browser: Any, server: Site) -> Iterator[Visit]:
    server.pause = 0.0
    visit = Visit(browser, server.url)
    yield visit
    for context in visit.contexts:
        context.close()
    assert visit.complaints == []


def upload(page: Any, *photos: Path) -> None:
    page.locator("#photos input[type=file]").first.set_input_files([str(photo) for photo in photos])
    page.locator("#faces img").wait_for()
    page.get_by_text(re.compile("faces? found")).wait_for()


def advanced(page: Any, steps: int) -> None:
    page.locator("#advanced").get_by_role("button", name="Advanced").click()
    field = page.locator("#steps input[type=number]")
    field.fill(str(steps))
    field.press("Tab")


def generate(page: Any) -> None:
    page.locator("#generate").click()
    page.locator("#status [data-state=done]").wait_for()
    page.locator("#gallery img").first.wait_for()


def test_from_photo_to_portraits(visit: Visit, server: Site) -> None:
    page = visit()
    upload(page, PEOPLE / "friends.jpg")
    assert "3 faces found" in page.locator("#faces-note").inner_text()
    # Pick the last of the three, who is not the largest face.
    before = page.locator("#faces img").get_attribute("src")
    box = page.locator("#faces img").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 5 / 6, box["y"] + box["height"] / 2)
    page.wait_for_function("old => document.querySelector('#faces img').src !== old", arg=before)

    server.pause, server.requests[:] = 0.08, []
    page.get_by_text("red hat", exact=True).click()
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('red hat')")
    page.locator("#prompt textarea").fill("a person smiling, blue background")
    page.locator("#style").get_by_text("Oil painting").click()
    page.locator("#generate").click()
    seen: set[str] = set()
    page.locator(".idgen-preview").first.wait_for()
    while page.locator("#status [data-state=working]").count():
        seen |= set(page.locator(".idgen-preview").evaluate_all("all => all.map(each => each.src)"))
        page.wait_for_timeout(60)
    assert len(seen) > 2, "the preview did not change"
    page.locator("#status [data-state=done]").wait_for()
    page.locator("#gallery img").first.wait_for()
    assert page.locator("#gallery .thumbnail-item").count() == 2
    captions = page.locator("#gallery .caption-label").all_inner_texts()
    assert len(captions) == 2 and all(re.search(r"likeness (-?\d\.\d\d|–) · seed \d+", text) for text in captions)
    assert "Likeness" in page.locator("#details").inner_text()
    page.locator("#gallery .thumbnail-item img").first.click()
    caption = page.locator("#gallery .preview .caption")
    caption.wait_for()
    caption.click(trial=True)  # fails when something lies over it

    (request,) = server.requests
    assert request.prompt.startswith("an oil painting of a person smiling")
    from idgen.api import default_extractor

    extractor = default_extractor()
    cleo, meant = extractor.face(PEOPLE / "cleo.jpg"), extractor.faces(request.who)
    assert len(meant) == 1 and float(meant[0].normed @ cleo.normed) > 0.6, "another face than the picked one was taken"


def test_several_photos_and_one_without_a_face(visit: Visit, tmp_path: Path) -> None:
    page = visit()
    empty = tmp_path / "wall.png"
    Image.new("RGB", (300, 300), (120, 160, 200)).save(empty)
    upload(page, PEOPLE / "ada.jpg", empty)
    page.get_by_text("Photo 2 shows none").wait_for()
    page.locator("#which").get_by_text("Photo 2").click()


def test_errors_are_toasts_that_name_the_cure(visit: Visit, server: Site) -> None:
    page = visit()
    page.locator("#generate").click()
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert "drop one under" in toast.inner_text()
    page.locator("#generate:not([disabled])").wait_for()
    assert page.locator("#cancel").count() == 0 or page.locator("#cancel").is_hidden()


@pytest.fixture
def steps_when_cancelled(server: Site, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps were done whenever a page cancelled a job that was not done."""
    steps, cancel = list[int](), Job.cancel

    def note(job: Job) -> bool:
        if not job.done:
            steps.append(server.steps)
        return cancel(job)

    monkeypatch.setattr(Job, "cancel", note)
    return steps


def idle(server: Site) -> None:
    """Wait until the engine has nothing to do."""
    wait_until(lambda: server.engine.stats().running == server.engine.stats().queued == 0)


def test_cancel_stops_the_work(visit: Visit, server: Site, steps_when_cancelled: list[int]) -> None:
    page = visit()
    upload(page, PEOPLE / "ada.jpg")
    advanced(page, 60)
    server.pause = 0.4
    page.locator("#generate").click()
    page.locator(".idgen-preview").first.wait_for()
    page.locator("#cancel").click()
    page.locator("#status [data-state=stopped]").wait_for()
    idle(server)
    assert server.steps - steps_when_cancelled[0] <= 2
    server.pause = 0.0
    generate(page)  # and the place is free again


def test_closing_the_page_stops_the_work_and_deletes_its_files(
    visit: Visit, server: Site, steps_when_cancelled: list[int]
) -> None:
    import tempfile

    folder = Path(tempfile.gettempdir())
    page = visit()
    upload(page, PEOPLE / "cleo.jpg")
    generate(page)
    assert list(folder.glob("idgen-demo-*/*.png"))
    advanced(page, 100)
    server.pause = 0.2
    page.locator("#generate").click()
    page.locator(".idgen-preview").first.wait_for()
    page.context.close()
    idle(server)
    assert server.steps - steps_when_cancelled[0] <= 2, "the engine went on working for a page that is gone"
    wait_until(lambda: not list(folder.glob("idgen-demo-*")))


def test_a_page_sees_nothing_of_another(visit: Visit) -> None:
    mine = visit()
    upload(mine, PEOPLE / "esme.jpg")
    generate(mine)
    mine.get_by_role("tab", name="History").click()
    mine.locator("#history img").first.wait_for()
    other = visit()
    for page in (other, mine):
        if page is mine:
            page.reload()
            page.locator("#generate").wait_for()
        assert page.locator("#gallery img").count() == 0
        assert page.locator("#faces img").count() == 0
        page.get_by_role("tab", name="History").click()
        page.locator("#history-empty").wait_for()
        assert page.locator("#history img").count() == 0


def test_go_on_from_a_portrait(visit: Visit, server: Site, tmp_path: Path) -> None:
    page = visit()
    upload(page, PEOPLE / "ada.jpg")
    generate(page)
    with page.expect_download() as download:
        page.locator("#download").click()
    saved = tmp_path / download.value.suggested_filename
    download.value.save_as(saved)
    metadata = read_metadata(saved)
    assert saved.name.endswith(".png") and str(metadata["seed"]) in saved.name

    def arrive(count: int) -> None:
        """Wait until the server was asked: the page still shows the end of the run before."""
        for _ in range(400):
            if len(server.requests) >= count:
                return
            page.wait_for_timeout(50)
        raise AssertionError(f"{len(server.requests)} requests instead of {count}")

    def press(name: str) -> Any:
        done = len(server.requests)
        page.locator(name).click()
        arrive(done + 1)
        page.locator("#status [data-state=done]").wait_for()
        page.locator("#actions").wait_for()
        assert len(server.requests) == done + 1
        return server.requests[-1]

    again = press("#again")
    assert (again.seed, again.n) == (metadata["seed"], 1)
    with page.expect_download() as download:
        page.locator("#download").click()
    download.value.save_as(tmp_path / "again.png")
    difference = ImageChops.difference(Image.open(tmp_path / "again.png"), Image.open(saved))
    assert max(high for _, high in difference.getextrema()) <= 3  # the first came out of a batch of two

    like = press("#more")
    assert like.image is not None and like.seed != again.seed and like.n == 2
    page.locator("#use-pose").click()
    page.locator("#pose img").wait_for()
    done = len(server.requests)
    page.locator("#generate").click()
    arrive(done + 1)
    # Random models paint no face that could be a pose; the request must carry it all the same.
    page.locator("#status").locator("[data-state=done], [data-state=failed]").wait_for()
    page.locator("#generate:not([disabled])").wait_for()
    assert server.requests[-1].pose is not None


def test_compare(visit: Visit) -> None:
    page = visit()
    upload(page, PEOPLE / "ben.jpg")
    page.locator("#prompt textarea").fill("a person laughing")
    page.get_by_role("tab", name="Compare").click()
    page.wait_for_function("document.querySelector('#compare-prompt textarea').value === 'a person laughing'")
    page.locator("#compare").click()
    page.locator("#compare-status [data-state=done]").wait_for()
    rows = page.locator("#compare-table tr").all_inner_texts()[1:]
    assert len(rows) >= 3 and all(re.search(r"\d\.\d s", row) for row in rows)
    assert page.locator("#compare-gallery .thumbnail-item").count() == len(rows)
    assert any("instantid" in row for row in rows)


def test_batch(visit: Visit, tmp_path: Path) -> None:
    page = visit()
    prompts = tmp_path / "prompts.txt"
    lines = ["a person smiling --n 2 --seed 3", "a person --photo ben.jpg", "a person --photo ../../etc/passwd"]
    prompts.write_text("\n".join(lines))
    upload(page, PEOPLE / "ada.jpg")
    page.get_by_role("tab", name="Batch").click()
    page.locator("#batch-file input[type=file]").set_input_files(str(prompts))
    page.locator("#batch-photos input[type=file]").set_input_files(str(PEOPLE / "ben.jpg"))
    page.locator("#batch-photos").get_by_text("ben").first.wait_for()
    page.locator("#batch").click()
    page.locator("#batch-status [data-state=done]").wait_for()
    assert "3 images, 1 rows failed" in page.locator("#batch-status").inner_text()
    assert "was not uploaded" in page.locator("#batch-table").inner_text()
    with page.expect_download() as download:
        page.locator("#batch-zip").click()
    download.value.save_as(tmp_path / "batch.zip")
    with zipfile.ZipFile(tmp_path / "batch.zip") as archive:
        names = archive.namelist()
        records = [json.loads(line) for line in archive.read("results.jsonl").decode().splitlines()]
    assert sum(name.endswith(".png") for name in names) == 3 and "index.html" in names
    assert [record["status"] for record in records] == ["done", "done", "done", "failed"]
    assert records[2]["person"] == "ben"


def test_phone(visit: Visit) -> None:
    page = visit(390, 844)
    upload(page, PEOPLE / "ada.jpg")
    generate(page)
    for tab in ("Create", "Compare", "Batch", "History"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, f"{tab} is wider than the screen"


def test_the_command_serves_the_page() -> None:
    port = free_port()
    command = [sys.executable, "-c", "from idgen.cli import main; main()", "demo", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as answer:
                    assert answer.status == 200
                    break
            except OSError:
                assert process.poll() is None, "the demo ended by itself"
                time.sleep(0.1)
    finally:
        process.terminate()
        process.wait(60)
