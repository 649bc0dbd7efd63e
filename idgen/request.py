"""A request: one validated order."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from idgen.errors import BadRequest

MIN_SIDE, MAX_SIDE = 16, 4096
"""pixels of a picture's side"""
SEED_LIMIT = 2**63 - 1


class Request(BaseModel):
    """Who, what and how. Fields left ``None`` take the pipeline's defaults.

    Build with :meth:`create`, which raises :class:`BadRequest` naming the field; or load from a portrait's metadata.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    who: Any = Field(default=None, repr=False)
    """A photo (path, bytes, PIL image, array), several photos of one person, or an :class:`idgen.Identity`."""
    prompt: str | None = None
    negative_prompt: str | None = None
    pipeline: str = "auto"
    width: int | None = Field(default=None, ge=MIN_SIDE, le=MAX_SIDE)
    """pixels, a multiple of 8"""
    height: int | None = Field(default=None, ge=MIN_SIDE, le=MAX_SIDE)
    steps: int | None = Field(default=None, ge=1, le=1000)
    guidance: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    """classifier-free guidance scale; up to 1 means off"""
    identity_scale: float | None = Field(default=None, ge=0, le=3, allow_inf_nan=False)
    """weight of the identity tokens; 0 is none"""
    structure_scale: float | None = Field(default=None, ge=0, le=3, allow_inf_nan=False)
    """InstantID: weight of the face structure network. FaceID-Plus V2: weight of the image refinement."""
    structure_start: float = Field(default=0.0, ge=0, lt=1, allow_inf_nan=False)
    structure_end: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    guess_mode: bool = False
    seed: int | None = Field(default=None, ge=0, le=SEED_LIMIT)
    """The k-th of n images has seed + k, so that each can be rendered again alone. ``None``: a random one."""
    n: int = Field(default=1, ge=1, le=64)
    scheduler: str | None = None
    image: Any = Field(default=None, repr=False)
    """Start from this picture (image-to-image)."""
    mask: Any = Field(default=None, repr=False)
    """White where the picture may change (inpainting)."""
    strength: float = Field(default=0.8, gt=0, le=1, allow_inf_nan=False)
    """Share of the steps that an image-to-image run does."""
    pose: Any = Field(default=None, repr=False)
    """A photo whose face gives position and pose, keypoints (5, 2) in pixels of the output, or a keypoint drawing."""
    reference: Any = Field(default=None, repr=False)
    """Arc2Face: a picture whose self-attention features are also attended to."""
    image_embedding: Any = Field(default=None, repr=False)
    """Plain IP-Adapter: the CLIP image embedding itself, (D,)."""

    @field_validator("width", "height")
    @classmethod
    def _multiple_of_eight(cls, value: int | None) -> int | None:
        if value is not None and value % 8:
            raise ValueError(f"must be a multiple of 8; the nearest is {max(16, round(value / 8) * 8)}")
        return value

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _no_nul(cls, value: str | None) -> str | None:
        if value is not None and "\x00" in value:
            raise ValueError("must not contain NUL characters")
        return value

    @model_validator(mode="after")
    def _belongs_together(self) -> Request:
        if self.mask is not None and self.image is None:
            raise ValueError("mask: needs image, the picture to change")
        if self.structure_start >= self.structure_end:
            raise ValueError("structure_start: must be below structure_end")
        if self.seed is not None and self.seed + self.n - 1 > SEED_LIMIT:
            raise ValueError(f"seed: seed + n must stay below {SEED_LIMIT + 1}")
        return self

    @classmethod
    def create(cls, **fields: Any) -> Request:
        """Validate ``fields``.

        Raises:
            BadRequest: names the first wrong field and what it may be.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or first["msg"].split(":")[0].split()[-1]
            raise BadRequest(_explain(field, first, cls), field) from None

    def drawn_size(self) -> tuple[int, int] | None:
        """(width, height) in pixels where the request names none and its pose is a keypoint drawing, which then decides
        it, floored to multiples of 8 (as InstantID's original); else ``None``. Decodes the picture.

        Raises:
            BadImage: the pose cannot be read. BadRequest: the drawing is too small or too large.
        """
        from idgen.images import open_photo
        from idgen.pictures import is_drawing, is_picture

        if self.width is not None or self.height is not None or not is_picture(self.pose):
            return None
        pose = open_photo(self.pose)
        if not is_drawing(pose):
            return None
        width, height = pose.width // 8 * 8, pose.height // 8 * 8
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_SIDE:
            raise BadRequest(
                f"pose: a drawing of {pose.width} x {pose.height} pixels cannot decide the picture's size, which is "
                f"{MIN_SIDE} to {MAX_SIDE} a side: give width and height.",
                "pose",
            )
        return width, height

    def change(self, **fields: Any) -> Request:
        """A copy with other fields, validated again."""
        return type(self).create(**{name: getattr(self, name) for name in type(self).model_fields} | fields)


def _explain(field: str, error: Any, cls: type[Request]) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        import difflib

        close = difflib.get_close_matches(field, cls.model_fields, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(cls.model_fields)}."
        return f"a request has no field {field!r}{hint}"
    given = error.get("input")
    shown = f" (given: {given!r})" if isinstance(given, (int, float, str, bool)) else ""
    return message if message.startswith(f"{field}:") else f"{field}: {message[0].lower()}{message[1:]}{shown}."
