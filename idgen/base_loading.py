"""Reads a base model from a diffusers folder, the hub or a single file, and says clearly what is wrong with it.

Weight files are mapped, not read: in the serving dtype a folder or file costs a CPU no memory of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from idgen.adapters.loading import dtype_option
from idgen.errors import BadWeights, IdgenError, WeightsMissing

FAMILIES = {"StableDiffusionXLPipeline": "sdxl", "StableDiffusionPipeline": "sd15"}


def load_pipe(
    source: str | Path, dtype: torch.dtype, config: str | Path | None, variant: str | None, device: str = "cpu"
) -> Any:
    """The diffusers pipeline of a base model. See :meth:`idgen.backbone.Backbone.load` for the arguments.

    Args:
        device: where a single file's tensors are put, one by one; a folder's are moved by the caller.
    Raises:
        WeightsMissing, BadWeights: nothing there; not a base model.
    """
    import diffusers

    path = Path(source)
    if path.is_file():
        return _load_single_file(path, dtype, config, device)
    if path.is_dir():
        index = path / "model_index.json"
        if not index.is_file():
            raise BadWeights(f"{path} is no diffusers folder: it has no model_index.json.")
        try:
            name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
        except ValueError:
            raise BadWeights(f"{index} is not valid JSON.") from None
        if name not in FAMILIES:
            raise BadWeights(f"{path} holds a {name}; idgen needs an SDXL or SD1.5 base model.")
    elif path.suffix or str(source).count("/") != 1:
        raise WeightsMissing(
            f"there is no base model at {source}: give a diffusers folder, a .safetensors file or a hub id."
        )
    options: dict[str, Any] = {**dtype_option(dtype), "safety_checker": None, "feature_extractor": None}
    if variant:
        options["variant"] = variant
    with _quiet():
        try:
            return diffusers.DiffusionPipeline.from_pretrained(str(source), **options)
        except OSError as error:
            if path.is_dir():
                raise BadWeights(f"{path} is incomplete or damaged ({first_line(error)}).") from None
            raise WeightsMissing(
                f"the base model {source!r} is not on this machine and could not be fetched ({first_line(error)}). "
                f"Fetch it with: hf download {source}"
            ) from None
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise BadWeights(f"{source} is not a usable base model ({first_line(error)}).") from None
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise BadWeights(f"{source} has a damaged safetensors file ({first_line(error)}).") from None


def _load_single_file(path: Path, dtype: torch.dtype, config: str | Path | None, device: str) -> Any:
    import diffusers
    from safetensors import safe_open

    from idgen.single_file import family_of, read_models

    try:
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
    except Exception as error:
        raise BadWeights(f"{path} is damaged or no safetensors file ({first_line(error)}).") from None
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise BadWeights(f"{path} is no base model: it has no key that begins with 'model.diffusion_model.'.")
    family = family_of(keys)
    if family is None:
        raise BadWeights(f"{path} lacks the text encoders of SDXL and SD1.5; idgen needs a whole base of either kind.")
    folder = _description(path, family, config)
    with _quiet():
        try:
            models = read_models(path, folder, family, dtype, device)
            # Weights of the folder are not read: what is passed in is not loaded; tokenizers and scheduler are.
            return diffusers.DiffusionPipeline.from_pretrained(
                str(folder), **models, safety_checker=None, feature_extractor=None, local_files_only=True
            )
        except IdgenError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise BadWeights(
                f"{path} cannot be loaded with the description in {folder} ({first_line(error)})."
            ) from None


def _description(path: Path, family: str, config: str | Path | None) -> Path:
    """A diffusers folder that describes the single file ``path``: ``config``, the store's public base, or the hub's."""
    from idgen.locate import locate
    from idgen.weights.fetch import fetch_hub
    from idgen.weights.manifest import get_entry

    if config is not None:
        folder = Path(config)
        try:
            name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        except OSError:
            raise WeightsMissing(
                f"there is no diffusers folder at {config}, given as config= for {path}: it has no model_index.json."
            ) from None
        except (ValueError, KeyError, TypeError):
            raise BadWeights(f"{folder / 'model_index.json'}, given for {path}, does not say what it is.") from None
        if FAMILIES.get(name) != family:
            raise BadWeights(f"{path} is an {family} base, but {config}, given as config=, describes a {name}.")
        return folder
    with suppress(IdgenError):
        return locate(family)
    entry = get_entry(family)
    texts = replace(entry, files=tuple(name for name in entry.files if not name.endswith(".safetensors")))
    try:
        return fetch_hub(texts, entry.revision, force=False, progress=False).root
    except WeightsMissing as error:
        raise WeightsMissing(
            f"{path} is there, but the description of its architecture is not: give a diffusers folder of an {family} "
            f"base as config=, or run once with a network. {first_line(error)}"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loaders' notes on absent safety checkers and per-component progress bars, not their errors."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before[0])
        transformers_logging.set_verbosity(before[1])
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """What an error says, without the rest of a library's report."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
