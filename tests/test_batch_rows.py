"""Prompt files: what is read from each format, and that one bad line costs one row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import idgen
from idgen.batch.names import TEMPLATE, check_template, file_name, person_of, slug
from idgen.batch.rows import read_rows
from idgen.batch.sources import resolve


def read(folder: Path, name: str, text: str | bytes, **axes: Any) -> list[tuple[int, int, Any]]:
    """Number, line, and the fields or the message of each row."""
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    rows = read_rows(file, axes.pop("defaults", {}), axes)
    return [(row.number, row.line, row.fields if row.problem is None else str(row.problem)) for row in rows]


def test_text_lines_are_prompts_with_flags_at_their_end(tmp_path: Path) -> None:
    text = """# a comment

a #1 fan -- of self--made art
red hat --seed 7 --pipeline instantid
a cat --negative blurry, dark --photo 'my cat.jpg' --n=2
C:\\pictures --photo C:\\a\\b.jpg
--prompt only flags
"""
    assert read(tmp_path, "a.txt", text) == [
        (1, 3, {"prompt": "a #1 fan -- of self--made art"}),
        (2, 4, {"prompt": "red hat", "seed": "7", "pipeline": "instantid"}),
        (3, 5, {"prompt": "a cat", "negative_prompt": "blurry, dark", "who": "my cat.jpg", "n": "2"}),
        (4, 6, {"prompt": "C:\\pictures", "who": "C:\\a\\b.jpg"}),
        (5, 7, {"prompt": "only flags"}),
    ]


def test_bad_text_lines_are_named_and_the_others_read(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.txt", b"good\nbad --sed 7\nbad --negative it's\n\xff\xfe\ngood too\n")
    assert [row[2]["prompt"] for row in rows if isinstance(row[2], dict)] == ["good", "good too"]
    assert [row[1] for row in rows] == [1, 2, 3, 4, 5]
    assert "'seed'" in rows[1][2] and "quotes" in rows[2][2] and "UTF-8" in rows[3][2]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--prompt", "--prompt has no value"),
        ("a cat --negative --seed 7", "--negative has no value"),
        ("a cat --prompt a dog", "--prompt twice"),
        ("a cat --seed 1 --seed 2", "--seed twice"),
    ],
)
def test_a_flag_without_a_value_or_given_twice_is_an_error_of_its_line(tmp_path: Path, line: str, said: str) -> None:
    rows = read(tmp_path, "a.txt", f"good\n{line}\n")
    assert rows[0] == (1, 1, {"prompt": "good"})
    assert rows[1][:2] == (2, 2) and said in rows[1][2]


def test_an_empty_text_can_be_given_in_quotes(tmp_path: Path) -> None:
    assert read(tmp_path, "a.txt", "a cat --negative ''\n") == [(1, 1, {"prompt": "a cat", "negative_prompt": ""})]


def test_csv_takes_any_usual_delimiter_empty_cells_and_cells_of_several_lines(tmp_path: Path) -> None:
    text = '\ufeffphoto,prompt,seed\na.jpg,"one, two",1\n,"three\nfour",\n\nb.jpg|c.jpg,five,2\n'
    assert read(tmp_path, "a.csv", text) == [
        (1, 2, {"who": "a.jpg", "prompt": "one, two", "seed": "1"}),
        (2, 3, {"prompt": "three\nfour"}),
        (3, 6, {"who": "b.jpg|c.jpg", "prompt": "five", "seed": "2"}),
    ]
    assert read(tmp_path, "b.csv", "prompt;seed\na, b;3\n") == [(1, 2, {"prompt": "a, b", "seed": "3"})]


def test_blank_lines_before_a_csv_header_are_skipped_and_counted(tmp_path: Path) -> None:
    for blank in ("\n", "\n \n", ",,\r\n", ";\n"):
        rows = read(tmp_path, "a.csv", f"{blank}prompt,seed\na,3\nb,4,5\n")
        begin = blank.count("\n") + 2
        assert rows[0] == (1, begin, {"prompt": "a", "seed": "3"})
        assert rows[1][1] == begin + 1 and "3 cells" in str(rows[1][2])
    assert read(tmp_path, "b.csv", "\n,,\n") == []


def test_a_csv_line_with_too_many_cells_says_to_quote_commas(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.csv", "prompt,seed\na,b,3\ngood,4\n")
    assert "quotes around commas" in rows[0][2] and rows[1][2] == {"prompt": "good", "seed": "4"}


def test_jsonl_rows_and_a_broken_line_between_them(tmp_path: Path) -> None:
    deep = "[" * 100_000
    rows = read(
        tmp_path, "a.jsonl", f'{{"prompt": "a", "size": "64x96"}}\n{{"prompt": \n[1]\n{deep}\n{{"prompt": "b"}}\n'
    )
    assert rows[0][2] == {"prompt": "a", "width": 64, "height": 96} and rows[4][1:] == (5, {"prompt": "b"})
    assert "not JSON" in rows[1][2] and "a row has fields" in rows[2][2] and "not JSON" in rows[3][2]


def test_yaml_rows_are_parsed_one_by_one_so_a_broken_one_harms_no_other(tmp_path: Path) -> None:
    text = """# people
- prompt: a
  photo: [x.jpg, y.jpg]
- prompt: "never closed
  seed: 1
- prompt: |
    two

    lines
- just a prompt
-
  prompt: {a: &b [1, *c]}
- prompt: last
"""
    rows = read(tmp_path, "a.yaml", text)
    assert [row[1] for row in rows] == [2, 4, 6, 10, 11, 13]
    assert rows[0][2] == {"prompt": "a", "who": ["x.jpg", "y.jpg"]}
    assert "not YAML in line 6" in rows[1][2] or "not YAML in line 5" in rows[1][2]
    assert rows[2][2] == {"prompt": "two\n\nlines\n"} and rows[3][2] == {"prompt": "just a prompt"}
    assert "not YAML" in rows[4][2] and rows[5][2] == {"prompt": "last"}


def test_yaml_sections_give_defaults_a_matrix_and_rows(tmp_path: Path) -> None:
    text = """defaults:
  steps: 20
matrix:
  people: [ada.jpg, {name: bob, photo: [b1.jpg, b2.jpg]}]
  prompts:
  - a
  - {prompt: b, guidance: 2}
  seeds: 3..4
rows:
- {prompt: c, steps: 5}
-  prompt: d
"""
    rows = [row[2] for row in read(tmp_path, "a.yaml", text, defaults={"steps": 9, "n": 2})]
    assert len(rows) == 10
    common = {"steps": 20, "n": 2}
    assert rows[0] == {**common, "who": "ada.jpg", "prompt": "a", "seed": 3}
    assert rows[7] == {**common, "who": ["b1.jpg", "b2.jpg"], "person": "bob", "prompt": "b", "guidance": 2, "seed": 4}
    assert rows[8] == {"steps": 5, "n": 2, "prompt": "c"}, "a row beats the file's defaults, these the command line's"
    assert rows[9] == {**common, "prompt": "d"}


def test_axes_from_outside_cross_every_row_that_lacks_the_field(tmp_path: Path) -> None:
    rows = read(
        tmp_path, "a.txt", "one\ntwo --pipeline arc2face\n", people=["a", "b"], pipelines=["x", "y"], seeds="0..1"
    )
    assert len(rows) == 8 + 4
    assert {row[2]["pipeline"] for row in rows[8:]} == {"arc2face"}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"promt": "x"}, "Did you mean 'prompt'"),
        ({"size": "big"}, "WIDTHxHEIGHT"),
        ({"matrix": []}, "a row"),
        ({"matrix": {"seeds": "9..1"}}, "FIRST..LAST"),
        ({"matrix": {"seeds": "0..99999999999"}}, "FIRST..LAST"),
        ({"matrix": {"people": []}}, "empty"),
        ({"matrix": {"mood": ["sad"]}}, "no field 'mood'"),
    ],
)
def test_what_is_no_field_is_refused_by_name(entry: dict[str, Any], said: str) -> None:
    rows = list(read_rows([entry, {"prompt": "good"}], {}, {}))
    if entry == {"matrix": []}:  # nothing to expand: a row without fields, which the plan judges
        assert rows[0].problem is None
    else:
        assert said in str(rows[0].problem)
    assert rows[1].fields == {"prompt": "good"}


def test_a_file_of_another_kind_or_none_is_refused_with_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(idgen.BadRequest, match=r"\.txt, \.csv, \.jsonl, \.yaml"):
        list(read_rows(tmp_path / "a.doc", {}, {}))
    with pytest.raises(idgen.BadRequest, match="no such file"):
        list(read_rows(tmp_path / "none.txt", {}, {}))


def test_ten_thousand_rows_stream_and_a_huge_line_costs_one_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with file.open("w") as out:
        out.write(json.dumps({"prompt": "x" * (1 << 20)}) + "\n")
        for k in range(10_000):
            out.write(json.dumps({"prompt": str(k)}) + "\n")
    rows = read_rows(file, {}, {})
    assert "longer than" in str(next(rows).problem)
    assert sum(row.problem is None for row in rows) == 10_000


def test_relative_paths_resolve_against_the_file_or_its_bucket(tmp_path: Path) -> None:
    assert Path(resolve("a/../b.jpg", str(tmp_path))) == tmp_path / "b.jpg"
    assert resolve("b.jpg", "s3://bucket/jobs") == "s3://bucket/jobs/b.jpg"
    assert resolve("gs://other/b.jpg", "s3://bucket/jobs") == "gs://other/b.jpg"


@pytest.mark.parametrize(
    "template", ["../{row}.png", "/{row}.png", "{row}.gif", "{row.__class__}.png", "{nothing}.png", "{row", "{}.png",
                 "c:{row}.png", "{person:d}.png"]
)  # fmt: skip
def test_templates_that_leave_the_folder_or_name_nothing_are_refused(template: str) -> None:
    with pytest.raises(idgen.BadRequest, match="--name"):
        check_template(template)


def test_names_of_people_become_names_of_files() -> None:
    values = {"row": 7, "line": 9, "pipeline": "a+b", "seed": 3, "image": 0, "id": "0" * 12}
    assert file_name(TEMPLATE, person="Ada L./../x", **values) == "00007-Ada_L._.._x-a+b-3.png"
    assert person_of("Ada", "x.png") == "Ada" and person_of(None, ["/a/bob.jpg", "/a/2.jpg"]) == "bob"
    assert person_of(None, "s3://b/people/ada/1.png") == "ada" and person_of(None, "C:\\ada\\2.png") == "ada"
    assert person_of(None, None) == "nobody"
    assert slug("..") == "_" and len(slug("x" * 500)) == 60
