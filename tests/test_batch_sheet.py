"""The contact sheet and the command line of a batch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from idgen.batch.sheet import contact_sheet
from idgen.cli import main
from tests import models

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = "</script><script>alert(1)</script>\" onload='x' & <b>"


def record(row: int, likeness: float | None, **fields: Any) -> dict[str, Any]:
    common = {"row": row, "line": row + 3, "image": 0, "status": "done", "file": f"{row}.png", "seed": row}
    about = {"person": "ada", "pipeline": "instantid", "likeness": likeness, "likeness_note": None}
    return {**common, **about, "request": {"prompt": f"prompt {row}"}, **fields}


RECORDS = [
    record(1, 0.2),
    record(2, 0.9, person="bob & <co>"),
    record(3, None, likeness_note="no face was found in the result"),
    record(4, -0.1, pipeline="arc2face", person="bob & <co>"),
    {"row": 5, "image": 0, "line": 8, "status": "failed", "error": f"no such file {HOSTILE}", "file": None},
]


class Tags(HTMLParser):
    """Collects tags, and whatever a page would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def test_hostile_prompts_names_and_errors_stay_text() -> None:
    records = [record(1, 0.5, person=HOSTILE, pipeline=HOSTILE, request={"prompt": HOSTILE}), RECORDS[-1]]
    found = Tags(contact_sheet(records, HOSTILE))
    assert found.tags.count("script") == 1 and "b" not in found.tags and not found.handlers


def test_the_page_needs_nothing_but_its_own_folder() -> None:
    page = contact_sheet([*RECORDS, record(6, 0.1, file="a b/ü#1%.png")], "night")
    assert Tags(page).fetched[-1] == "a%20b/%C3%BC%231%25.png"
    assert not re.search(r"https?:|url\(|@import", page)


def test_a_page_of_a_million_images_stops_at_ten_thousand_and_says_so() -> None:
    page = contact_sheet((record(k, 0.5) for k in range(10_100)), "night")
    assert page.count("<figure") == 10_000 and "100 more are in the folder" in page


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: install your system's package")
@pytest.mark.parametrize(
    ("choices", "rows"),
    [
        ({}, [1, 2, 3, 4]),
        ({"sort": "high"}, [2, 1, 4, 3]),
        ({"sort": "low"}, [4, 1, 2, 3]),
        ({"person": "bob & <co>"}, [2, 4]),
        ({"person": "bob & <co>", "pipeline": "arc2face"}, [4]),
    ],
)
def test_a_real_browser_sorts_and_filters_from_disk(tmp_path: Path, choices: dict[str, str], rows: list[int]) -> None:
    act = "".join(f"document.getElementById('{name}').value = {json.dumps(v)};" for name, v in choices.items())
    page = contact_sheet(RECORDS, "night").replace(
        "</html>", f"<script>{act} form.dispatchEvent(new Event('input'))</script></html>"
    )
    file = tmp_path / "index.html"
    file.write_text(page)
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [str(CHROMIUM), *quiet, profile, "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    cards = re.findall(r"<figure[^>]*>", dom)
    assert [int(re.search(r'data-row="(\d+)"', c)[1]) + 1 for c in cards if "hidden" not in c] == rows  # type: ignore[index]
    assert f"{len(rows)} of 4 pictures" in dom


@pytest.fixture
def job(tmp_path: Path) -> Path:
    models.photos(tmp_path / "photos")
    (tmp_path / "rows.txt").write_text("a painting --seed 3\na drawing --sed 4\n")
    return tmp_path


def run(job: Path, *arguments: str) -> int:
    small = ["--pipeline", models.PIPELINE, "--size=32x32", "--steps=1", "--guidance=1"]
    people = [f"--photo={job}/photos/cyan.png", f"--photo={job}/photos/magenta.png"]
    with pytest.raises(SystemExit) as ended:
        main(["batch", str(job / "rows.txt"), *small, *people, *models.options(job), *arguments])
    return int(ended.value.code or 0)


def test_the_command_renders_the_good_rows_names_the_bad_and_exits_with_2(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(job, "--out", str(job / "out")) == 2
    said = capsys.readouterr()
    assert "rows.txt:2: a row has no field 'sed'. Did you mean 'seed'?" in said.err
    assert "2 rendered" in said.out and "1 failed" in said.out and "━" not in said.err, "no bar where nobody watches"
    assert len(list((job / "out").glob("*.png"))) == 2, "two people were given, so each good row is rendered for both"
    (job / "rows.txt").write_text("a painting --seed 3\n")
    assert run(job, "--out", str(job / "out"), "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["kept"], summary["failed"]) == (2, 0)
    assert json.loads((job / "out/summary.json").read_text())["images"] == 2


def test_a_dry_run_lists_every_problem_and_writes_nothing(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (job / "rows.txt").write_text("a --photo nobody.png\nb --photo photos/nobody.png\nc --width 33\nd\n")
    assert run(job, "--dry-run", "--out", str(job / "out")) == 2
    said = capsys.readouterr()
    assert re.findall(r"rows\.txt:(\d+):", said.err) == ["1", "2", "3"]
    assert "6 rows, 2 images to render, 4 bad" in said.out
    assert not (job / "out").exists()


def test_a_missing_file_or_folder_is_the_users_input(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(job) == 2
    assert "--out FOLDER" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["batch", str(job / "none.yaml"), "--out", str(job / "out")])
    assert ended.value.code == 2 and "no such file" in capsys.readouterr().err
    assert not (job / "out").exists()


@pytest.mark.parametrize("value", ["0", "-3"])
def test_a_batch_size_below_one_is_refused(job: Path, value: str) -> None:
    assert run(job, "--out", str(job / "out"), f"--batch-size={value}") == 2
