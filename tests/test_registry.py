"""The registry: ours, third parties', and what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import idgen
from idgen import registry
from idgen.errors import BadRequest, LicenceRefused, WeightsMissing
from idgen.weights.manifest import load_manifest
from tests import tiny

EXPECTED = {
    "ip-adapter", "ip-adapter-plus", "ip-adapter-plus-face", "ip-adapter-faceid", "ip-adapter-faceid-plus",
    "ip-adapter-faceid-plusv2", "ip-adapter-faceid-portrait", "instantid", "arc2face",
}  # fmt: skip


@pytest.fixture
def empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDGEN_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_every_promised_pipeline_is_registered_and_described() -> None:
    infos = {info.name: info for info in idgen.pipelines()}
    assert set(infos) >= EXPECTED
    assert all(info.description and info.bases for info in infos.values())


def test_every_weight_that_a_pipeline_names_is_in_the_manifest_or_in_mini() -> None:
    from idgen.locate import MINI

    manifest = load_manifest()
    for cls in registry.methods().values():
        for base in cls.bases():
            for entry in registry.needed_entries(cls, base):
                assert entry in MINI if base.startswith("mini") else entry in manifest, (cls.name, entry)


def test_pipelines_is_callable_after_its_submodules_were_imported() -> None:
    importlib.import_module("idgen.pipelines.instantid")
    assert idgen.pipelines()


@pytest.mark.usefixtures("empty_store")
def test_missing_weights_name_the_command_that_gets_them() -> None:
    with pytest.raises(WeightsMissing, match="idgen weights pull"):
        idgen.load("instantid", base="sdxl")


@pytest.mark.usefixtures("empty_store")
def test_commercial_only_refuses_and_says_what_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDGEN_COMMERCIAL_ONLY", "1")
    with pytest.raises(LicenceRefused, match="ip-adapter-plus-face on sdxl"):
        idgen.load("ip-adapter-faceid", base="sdxl")
    with pytest.raises(LicenceRefused):
        idgen.load("instantid", base="sdxl")
    with pytest.raises(WeightsMissing):
        idgen.load("ip-adapter-plus-face", base="sdxl")


def test_an_unknown_pipeline_suggests_the_nearest() -> None:
    with pytest.raises(BadRequest, match="Did you mean 'instantid'"):
        idgen.load("instant-id")


def test_a_wrong_base_or_option_is_refused_by_name() -> None:
    with pytest.raises(BadRequest, match="no weights for 'sd15'"):
        idgen.load("instantid", base="sd15")
    with pytest.raises(BadRequest, match="no option 'shine'"):
        idgen.load("text-to-image", base=tiny.SDXL, shine=True)
    with pytest.raises(BadRequest, match="attention backend 'magic'"):
        idgen.load("text-to-image", base=tiny.SDXL, attention="magic")


def test_a_name_is_taken_once() -> None:
    class Other(idgen.Method):
        def condition(self, orders):  # type: ignore[no-untyped-def]
            raise AssertionError

    with pytest.raises(BadRequest, match="already registered"):
        idgen.register("instantid")(Other)
    with pytest.raises(BadRequest, match="lower-case"):
        idgen.register("My Method")


PLUGIN = '''
import idgen
from idgen.conditioning import Conditioning

@idgen.register("theirs")
class Theirs(idgen.Method):
    """A third party's."""
    description = "a plugin"
    weights = {"sdxl": {}}
    def condition(self, orders):
        return Conditioning(self.text(orders))
'''


def test_a_third_partys_entry_point_is_found_and_runs(tmp_path: Path) -> None:
    (tmp_path / "their_plugin.py").write_text(PLUGIN)
    (tmp_path / "broken_plugin.py").write_text("import does_not_exist")
    info = tmp_path / "their_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[idgen.pipelines]\ntheirs = their_plugin:Theirs\nbroken = broken_plugin:Nothing\n"
    )
    repository = Path(__file__).parent.parent
    script = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(repository)!r}]\n"
        "import idgen, warnings\n"
        "from tests import tiny\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    names = [p.name for p in idgen.pipelines()]\n"
        "assert 'theirs' in names, names\n"
        "assert any('broken' in str(w.message) for w in seen)\n"
        "out = tiny.load('theirs').generate(None, 'x', output='latent', **tiny.SMALL)\n"
        "print(tuple(out.shape))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(1, 4, 8, 8)" in done.stdout


def test_commercial_only_also_holds_for_combinations_on_a_base_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDGEN_COMMERCIAL_ONLY", "1")
    for pipeline in ("instantid", "instantid+ip-adapter-faceid"):
        for base in ("a/folder", tiny.backbone()):
            with pytest.raises(idgen.LicenceRefused):
                idgen.load(pipeline, base=base)


def test_commercial_only_passes_over_restricted_face_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    from idgen import api

    asked = []
    monkeypatch.setattr(api, "locate", lambda entry: asked.append(entry) or Path(entry))
    monkeypatch.setattr(api, "_extractor", lambda pack, *_: pack)
    assert str(api.default_extractor()) == "antelopev2"
    monkeypatch.setenv("IDGEN_COMMERCIAL_ONLY", "1")
    assert str(api.default_extractor()) == "mini-faces"


def test_a_recogniser_alone_is_used_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from idgen import api
    from idgen.faces import FaceExtractor
    from tests import facepacks

    monkeypatch.setattr(api, "default_extractor", lambda: FaceExtractor(facepacks.pack(tmp_path)))
    with pytest.raises(idgen.IdgenError, match=r"nowhere\.onnx"):
        idgen.load("text-to-image", base=tiny.backbone(), recogniser=tmp_path / "nowhere.onnx")
