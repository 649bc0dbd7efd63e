"""A copy of mini by path gets mini's own weights and defaults; names that are joined differ, everywhere by one rule."""

from __future__ import annotations

from pathlib import Path

import pytest

import idgen
from idgen.bases import base_name
from idgen.demo import prompts
from idgen.demo.limits import Limits
from idgen.errors import BadRequest
from idgen.locate import locate
from idgen.method import MINI_DEFAULTS
from idgen.registry import methods_of
from idgen.request import Request
from idgen.speed import Levers
from idgen.weights.convert import convert
from tests import tiny


@pytest.mark.parametrize(
    ("mini", "pipeline"), [("mini-xl", "ip-adapter-faceid"), ("mini-xl", "instantid"), ("mini-sd15", "arc2face")]
)
def test_a_converted_copy_of_mini_gets_minis_adapters_faces_and_defaults(
    mini: str, pipeline: str, tmp_path: Path
) -> None:
    copy = convert(locate(mini), tmp_path / "copy", "float32")
    pipe = idgen.load(pipeline, base=copy, device="cpu", dtype="float32")
    assert base_name(pipe.backbone) == mini and pipe.backbone.source == str(copy)
    assert pipe.settings(Request.create(prompt="x"))["guidance"] == MINI_DEFAULTS["guidance"]
    assert pipe.extractor is not None and "mini" in str(pipe.extractor.pack)


def test_other_bases_by_path_count_as_the_public_ones_of_their_family() -> None:
    assert base_name(tiny.backbone()) == "sdxl" and base_name(tiny.backbone("sd15")) == "sd15"


def test_a_few_step_lora_for_mini_is_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idgen.api._backbone", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(BadRequest, match="mini has no few-step LoRA"):
        idgen.load("instantid", base="mini", speed=Levers(few_step="lcm"))


TWICE = "instantid+ip-adapter-faceid+instantid"


def test_no_pipeline_is_named_twice(tmp_path: Path) -> None:
    assert [cls.name for cls in methods_of("instantid+ip-adapter-faceid")] == ["instantid", "ip-adapter-faceid"]
    with pytest.raises(BadRequest, match="names a pipeline twice"):
        idgen.load(TWICE, base="mini-xl")
    (tmp_path / "rows.txt").write_text(f"x --pipeline {TWICE}\nx --pipeline nonsense\n")
    ready = ["instantid", "ip-adapter-faceid"]
    twice, unknown = prompts.read(str(tmp_path / "rows.txt"), {}, lambda _: None, ready[0], ready, Limits())
    assert "names a pipeline twice" in twice.records[0]["error"]
    assert "There are:" in unknown.records[0]["error"]
