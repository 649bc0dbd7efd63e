"""``/v1/faces`` and ``/v1/identities``: see who is in a photo, enrol a person once and refer to them by id."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import APIRouter, File, Form, UploadFile

from idgen.errors import BadWeights
from idgen.faces import Face
from idgen.identity import Identity
from idgen.images import open_photo
from idgen.service import photos
from idgen.service.errors import ApiError
from idgen.service.openai_api import ERRORS
from idgen.service.schemas import Deleted, FaceData, FacesAnswer, IdentityData, IdentityList
from idgen.service.state import Caller, Service, ServiceOf

log = logging.getLogger("idgen.service")
router = APIRouter(prefix="/v1", tags=["People"], responses=ERRORS)
T = TypeVar("T")


@router.post("/faces")
async def faces(
    photo: Annotated[UploadFile, File(description="The photo.")], service: ServiceOf, _: Caller
) -> FacesAnswer:
    """Find all faces in a photo. Nothing of it is kept."""
    data = await photos.checked(await photo.read(), service.settings, "photo")
    picture = await asyncio.to_thread(open_photo, data)
    found = await _looking(service, lambda: service.extractors()[0].faces(picture))
    return FacesAnswer(width=picture.width, height=picture.height, faces=[_face(k, f) for k, f in enumerate(found)])


@router.post("/identities", status_code=201)
async def enrol(
    photo: Annotated[list[UploadFile], File(description="One or more photos of one person.")],
    service: ServiceOf,
    owner: Caller,
    name: Annotated[str | None, Form(max_length=200)] = None,
    face: Annotated[int | None, Form(ge=0, le=1000, description="Which face of a single photo.")] = None,
) -> IdentityData:
    """Enrol a person. Kept are the embeddings, five keypoints and the face's crop; the photos are not."""
    photos.check_count(len(photo), service.settings, "photo")
    if face is not None and len(photo) > 1:
        raise ApiError(400, "face is for a single photo; send the others cut to the person.", "invalid_field", "face")
    files = [await photos.checked(await upload.read(), service.settings, "photo") for upload in photo]

    def make() -> Identity:
        identities = [
            Identity.from_photos(files, extractor, pick="largest" if face is None else face, name=name)
            for extractor in service.extractors()
        ]
        joined = identities[0]
        for other in identities[1:]:
            joined = joined.joined(other)
        return joined

    identity = await _looking(service, make)
    return _identity(service, owner, await asyncio.to_thread(service.shelf.add, owner, identity), identity)


@router.get("/identities")
def identities(service: ServiceOf, owner: Caller) -> IdentityList:
    """The caller's identities."""
    shelf, data = service.shelf, []
    for name in shelf.names(owner):
        try:
            data.append(_identity(service, owner, name, shelf.get(owner, name)))
        except ApiError:  # deleted in this moment
            continue
        except BadWeights as error:  # one damaged file must not hide the others
            log.error("%s", error)
    return IdentityList(data=data)


@router.get("/identities/{identity_id}")
def identity(identity_id: str, service: ServiceOf, owner: Caller) -> IdentityData:
    """One identity."""
    return _identity(service, owner, identity_id, service.shelf.get(owner, identity_id, "identity_id"))


@router.delete("/identities/{identity_id}")
def forget(identity_id: str, service: ServiceOf, owner: Caller) -> Deleted:
    """Delete an identity from the disk."""
    service.shelf.delete(owner, identity_id)
    return Deleted(id=identity_id)


async def _looking(service: Service, work: Callable[[], T]) -> T:
    async with service.looking:
        return await asyncio.to_thread(work)


def _face(index: int, face: Face) -> FaceData:
    return FaceData(
        index=index,
        box=[round(float(value), 2) for value in face.box],
        keypoints=[[round(float(x), 2), round(float(y), 2)] for x, y in face.keypoints],
        score=round(float(face.score), 4),
    )


def _identity(service: Service, owner: str, name: str, identity: Identity) -> IdentityData:
    return IdentityData(
        id=name,
        created=service.shelf.created(owner, name),
        name=identity.name,
        recognisers=list(identity.embeddings),
    )
