"""``/v1/images/edits``, ``/v1/images/generations`` and ``/v1/models`` as the OpenAI API has them.

Source: the OpenAI API reference, "Images", and the types of the official ``openai`` Python client.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from idgen.jobs import Job
from idgen.portrait import Portrait
from idgen.registry import method, methods
from idgen.service import photos
from idgen.service.bridge import KEEP_ALIVE, finished, followed, server_sent, streamed
from idgen.service.errors import ApiError, ErrorBody, explain, first_fault
from idgen.service.pictures import as_base64, encode_portrait
from idgen.service.schemas import GENERATION_EXAMPLES, ImageData, ImagesAnswer, ImagesOrder, Model, ModelList
from idgen.service.state import Caller, Orderer, Service, ServiceOf

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request's fault; the message says what to do."},
    "5XX": {"model": ErrorBody, "description": "The server's fault."},
}
router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=ERRORS)

_FILES = {"type": "array", "maxItems": 16, "items": {"type": "string", "format": "binary"}}
_NO_USAGE = {
    **{"input_tokens": 0, "output_tokens": 0, "total_tokens": 0},
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
"""Clients expect the field; nothing here is counted in tokens."""


def _edit_schema() -> dict[str, Any]:
    """The form of an edit, for the OpenAPI description: files beside the fields of :class:`ImagesOrder`."""
    schema = ImagesOrder.model_json_schema()
    files = {
        "image": _FILES | {"description": "Photos of the person; also as `image[]`."},
        "mask": {"type": "string", "format": "binary", "description": "Transparent where the first may change."},
    }
    schema["properties"] = files | schema["properties"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@router.get("/models")
def models(service: ServiceOf, _: Caller) -> ModelList:
    """The pipelines that may be given as `model`."""
    return ModelList(data=[_model(name) for name in service.names()])


@router.get("/models/{model}")
def model(model: str, service: ServiceOf, _: Caller) -> Model:
    """One pipeline."""
    return _model(service.resolve(model, True, "model"))


@router.post("/images/generations", response_model=ImagesAnswer)
async def generations(
    order: Annotated[ImagesOrder, Body(examples=GENERATION_EXAMPLES)],
    request: Request,
    service: ServiceOf,
    owner: Orderer,
) -> Response:
    """Make images from a prompt alone, or of an enrolled person with `identity`."""
    who = service.shelf.get(owner, order.identity) if order.identity else None
    return await _run(order, request, service, {"who": who}, "image_generation")


@router.post("/images/edits", response_model=ImagesAnswer, openapi_extra=_edit_schema())
async def edits(request: Request, service: ServiceOf, owner: Orderer) -> Response:
    """Make portraits of the person in one or several photos. With a mask, change the first photo there only."""
    # Parsed by hand, for a file comes as `image` or `image[]`, and an unknown field is refused with its name.
    async with request.form(max_files=service.settings.max_photos + 2, max_fields=64) as form:
        uploads = [value for key in ("image", "image[]") for value in form.getlist(key)]
        mask_file = form.get("mask")
        texts = {key: value for key, value in form.items() if key not in ("image", "image[]", "mask")}
        if not all(isinstance(upload, UploadFile) for upload in uploads):
            raise ApiError(400, "image must be a file.", "invalid_field", "image")
        if mask_file is not None and not isinstance(mask_file, UploadFile):
            raise ApiError(400, "mask must be a file.", "invalid_field", "mask")
        photos.check_count(len(uploads), service.settings, "image")
        files = [await upload.read() for upload in uploads if isinstance(upload, UploadFile)]
        mask_data = await mask_file.read() if isinstance(mask_file, UploadFile) else None
    try:
        order = ImagesOrder.model_validate(texts)
    except ValidationError as error:
        raise first_fault(error.errors()) from None
    people = [await photos.checked(data, service.settings, "image") for data in files]
    fields: dict[str, Any] = {"who": people}
    if order.identity is not None:
        if people and mask_data is None:  # a masked photo is what is changed, whoever it then shows
            raise ApiError(400, "give image or identity, not both.", "invalid_field", "identity")
        fields["who"] = service.shelf.get(owner, order.identity)
    elif not people:
        raise ApiError(400, "an edit needs a photo in image, or identity.", "missing_image", "image")
    if mask_data is not None:
        if not people:
            raise ApiError(400, "a mask needs the photo it belongs to.", "missing_image", "image")
        buffer = io.BytesIO()
        (await photos.mask_from_alpha(mask_data, service.settings)).save(buffer, "PNG")
        fields |= {"image": people[0], "mask": buffer.getvalue()}
    return await _run(order, request, service, fields, "image_edit")


def _model(name: str) -> Model:
    known = methods()
    description = " + ".join(known[part].description for part in name.split("+") if part in known)
    return Model(id=name, description=description)


async def _run(order: ImagesOrder, request: Request, service: Service, fields: dict[str, Any], kind: str) -> Response:
    if order.response_format == "url" and not service.settings.picture_urls:
        raise ApiError(400, "this server gives no URLs; ask for b64_json.", "invalid_field", "response_format")
    name = service.resolve(order.model, fields["who"] is not None, "model")
    size = None if order.size in (None, "auto") else [int(side) for side in str(order.size).split("x")]
    made = service.order(
        {
            **order.look(),
            **fields,
            "prompt": order.prompt,
            "pipeline": name,
            "n": order.n,
            "width": size and size[0],
            "height": size and size[1],
        }
    )
    if order.stream:
        wanted = order.partial_images or 0
        steps = made.steps or (method(name.split("+")[0]).defaults.steps if name != "auto" else 30)
        job = service.submit(made, order.deadline, max(1, steps // (wanted + 1)) if wanted else 0)
        return streamed(job, _stream(job, order, kind, wanted))
    portraits = await finished(service.submit(made, order.deadline), request)
    data = [await _datum(portrait, order, request, service) for portrait in portraits]
    answer = ImagesAnswer(
        created=int(time.time()),
        data=data,
        model=portraits[0].provenance["request"]["pipeline"],
        output_format=order.output_format or "png",
        size=_size(portraits[0].image),
    )
    return JSONResponse(answer.model_dump(exclude={"data": {"__all__": _absent(order)}}))


def _absent(order: ImagesOrder) -> set[str]:
    return {"b64_json"} if order.response_format == "url" else {"url"}


async def _datum(portrait: Portrait, order: ImagesOrder, request: Request, service: Service) -> ImageData:
    kind = order.output_format or "png"
    file = await encode_portrait(portrait, kind, _quality(order))
    data = ImageData(seed=portrait.seed, likeness=portrait.likeness, likeness_note=portrait.likeness_note)
    if order.response_format == "url":
        data.url = str(request.url_for("picture", name=service.pictures.put(file, kind)))
    else:
        data.b64_json = base64.b64encode(file).decode()
    return data


async def _stream(job: Job, order: ImagesOrder, kind: str, wanted: int) -> AsyncIterator[bytes]:
    """OpenAI's events: ``<kind>.partial_image`` up to ``wanted`` times, then ``<kind>.completed`` for each image."""
    output = order.output_format or "png"
    common = {"background": "opaque", "quality": "auto", "output_format": output}
    shown = 0
    async for progress in followed(job):
        if progress is None:
            yield KEEP_ALIVE
        for image in progress.previews or [] if progress and progress.step < progress.total and shown < wanted else []:
            partial = {
                "type": f"{kind}.partial_image",
                "b64_json": await as_base64(image, output, _quality(order)),
                "partial_image_index": shown,
                "created_at": int(time.time()),
                "size": _size(image),
            }
            yield server_sent(f"{kind}.partial_image", partial | common)
        shown += bool(progress and progress.previews)
    try:
        portraits = job.result(0)
    except Exception as error:
        yield server_sent("error", explain(error)[1])
        return
    for portrait in portraits:
        completed = {
            "type": f"{kind}.completed",
            "b64_json": base64.b64encode(await encode_portrait(portrait, output, _quality(order))).decode(),
            "created_at": int(time.time()),
            "size": _size(portrait.image),
            "seed": portrait.seed,
            "likeness": portrait.likeness,
            "likeness_note": portrait.likeness_note,
            "usage": _NO_USAGE,
        }
        yield server_sent(f"{kind}.completed", completed | common)


def _quality(order: ImagesOrder) -> int:
    return 95 if order.output_compression is None else order.output_compression


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
