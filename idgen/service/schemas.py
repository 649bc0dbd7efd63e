"""What clients send and receive."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from idgen.request import MAX_SIDE, SEED_LIMIT


class Look(BaseModel):
    """idgen's own fields, which every order may have. Fields left out take the pipeline's defaults."""

    model_config = ConfigDict(extra="forbid")

    negative_prompt: str | None = Field(default=None, max_length=32_000, description="What to avoid.")
    seed: int | None = Field(
        default=None, ge=0, le=SEED_LIMIT, description="Same seed, same picture; the k-th image has seed + k."
    )
    steps: int | None = Field(default=None, ge=1, le=1000, description="Denoising steps.")
    guidance: float | None = Field(
        default=None, ge=0, le=100, allow_inf_nan=False, description="Classifier-free guidance scale; up to 1 is off."
    )
    identity_scale: float | None = Field(
        default=None, ge=0, le=3, allow_inf_nan=False, description="Weight of the identity."
    )
    structure_scale: float | None = Field(
        default=None, ge=0, le=3, allow_inf_nan=False, description="Weight of the face structure."
    )
    scheduler: str | None = Field(default=None, max_length=64, description="euler, dpm++-2m-karras, ddim, lcm ...")
    strength: float | None = Field(
        default=None, gt=0, le=1, allow_inf_nan=False, description="How far to leave the picture to start from."
    )
    identity: str | None = Field(
        default=None, max_length=64, description="Id of an enrolled identity, see /v1/identities."
    )
    deadline: float | None = Field(
        default=None, gt=0, le=86_400, allow_inf_nan=False, description="Seconds after which to give up."
    )

    def look(self) -> dict[str, Any]:
        """The fields that :class:`idgen.Request` has too."""
        names = ("negative_prompt", "seed", "steps", "guidance", "identity_scale", "structure_scale", "scheduler")
        return {name: getattr(self, name) for name in (*names, "strength")}


class ImagesOrder(Look):
    """The OpenAI Images fields, of generations and edits; more below. `user`, `quality` and the like change nothing."""

    prompt: str = Field(min_length=1, max_length=32_000, description="What to show.")
    model: str | None = Field(default=None, max_length=128, description="A pipeline's name, see /v1/models.")
    n: int | None = Field(default=None, ge=1, le=64, description="How many images.")
    size: str | None = Field(default=None, pattern=r"^(auto|\d{2,4}x\d{2,4})$", description="WIDTHxHEIGHT or auto.")
    response_format: Literal["b64_json", "url"] | None = Field(default=None, description="b64_json unless asked.")
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(default=None, ge=0, le=100, description="Quality of JPEG and WebP.")
    stream: bool | None = Field(default=None, description="Send partial images as Server-Sent Events.")
    partial_images: int | None = Field(default=None, ge=0, le=3, description="Partial images of each image.")
    background: Literal["auto", "opaque"] | None = None
    quality: str | None = Field(default=None, max_length=32)
    moderation: str | None = Field(default=None, max_length=32)
    style: str | None = Field(default=None, max_length=32)
    input_fidelity: str | None = Field(default=None, max_length=32)
    user: str | None = Field(default=None, max_length=512)


GENERATION_EXAMPLES = [
    {"model": "text-to-image", "prompt": "a watercolor portrait of an old sailor", "n": 1, "size": "512x512"},
    {"prompt": "oil painting of an astronaut", "identity": "idn_0123456789abcdef01234567", "seed": 7},
]


class PortraitsOrder(Look):
    """One order of the native API."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"prompt": "oil painting of an astronaut", "identity": "idn_0123456789abcdef01234567", "n": 2},
                {"prompt": "a watercolor", "photos": ["iVBORw0KGgo..."], "pipeline": "instantid", "seed": 7},
            ]
        },
    )

    prompt: str | None = Field(default=None, max_length=32_000, description="What to show.")
    photos: list[str] = Field(
        default=[], max_length=64, description="Photos of one person: base64, data URLs, or URLs on an allowed host."
    )
    pipeline: str = Field(default="auto", max_length=128, description="See /v1/models.")
    n: int = Field(default=1, ge=1, le=64, description="How many images.")
    width: int | None = Field(default=None, ge=16, le=MAX_SIDE, description="Pixels, a multiple of 8.")
    height: int | None = Field(default=None, ge=16, le=MAX_SIDE, description="Pixels, a multiple of 8.")
    pose: str | None = Field(default=None, description="A photo whose face gives place and pose, as in photos.")
    image: str | None = Field(default=None, description="A picture to start from, as in photos.")
    mask: str | None = Field(default=None, description="White where the picture may change, as in photos.")
    output_format: Literal["png", "jpeg", "webp"] = "png"
    stream: bool = Field(default=False, description="Answer with Server-Sent Events.")
    previews: int = Field(default=0, ge=0, le=1000, description="With stream: a preview after every so many steps.")


class ImageData(BaseModel):
    """One picture in OpenAI's shape, and what idgen knows of it."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int
    likeness: float | None = Field(description="Cosine between the identity and the face in the picture, -1 to 1.")
    likeness_note: str | None = Field(description="Why it could not be measured.")


class ImagesAnswer(BaseModel):
    """OpenAI's shape."""

    created: int
    data: list[ImageData]
    model: str
    output_format: str
    size: str
    background: str = "opaque"
    quality: str = "auto"


class PortraitData(BaseModel):
    """One portrait of the native API."""

    image: str = Field(description="base64 of the file")
    seed: int
    likeness: float | None
    likeness_note: str | None
    provenance: dict[str, Any]


class PortraitsAnswer(BaseModel):
    """Answer of the native API without streaming."""

    id: str
    pipeline: str
    seconds: float = Field(description="from the order to the answer")
    output_format: str
    portraits: list[PortraitData]


class Model(BaseModel):
    """A pipeline in the shape of an OpenAI model."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "idgen"
    description: str = ""


class ModelList(BaseModel):
    """All pipelines served here."""

    object: Literal["list"] = "list"
    data: list[Model]


class FaceData(BaseModel):
    """One face in a photo, the largest first."""

    index: int
    box: list[float] = Field(description="left, top, right, bottom in pixels of the upright photo")
    keypoints: list[list[float]] = Field(description="eyes, nose, corners of the mouth, x and y in pixels")
    score: float


class FacesAnswer(BaseModel):
    """All faces in a photo."""

    width: int
    height: int
    faces: list[FaceData]


class IdentityData(BaseModel):
    """An enrolled identity."""

    id: str
    object: Literal["identity"] = "identity"
    created: int
    name: str | None
    recognisers: list[str] = Field(description="whose pipelines can use it")


class IdentityList(BaseModel):
    """The caller's identities, the oldest first."""

    object: Literal["list"] = "list"
    data: list[IdentityData]


class Deleted(BaseModel):
    """What was deleted."""

    id: str
    object: Literal["identity.deleted"] = "identity.deleted"
    deleted: bool = True
