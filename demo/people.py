"""The person: faces found in the user's photos, drawn, and the one picked in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFilter

from idgen.demo.limits import Limits

if TYPE_CHECKING:
    from idgen.faces import Face, FaceExtractor

ACCENT = (139, 92, 246)
DARK = (15, 23, 42)
SMALLEST = 256
"""Photos smaller than this are shown enlarged, or the frame would cover the face."""
LARGEST = 1600
"""Photos are shown at most this wide and high; a phone's twelve megapixels would only be slow."""


@dataclass(eq=False)
class Sitting:
    """One photo, the faces found in it, largest first, and which of them is meant."""

    path: str
    photo: Image.Image
    faces: list[Face] = field(default_factory=list)
    pick: int = 0
    problem: str | None = None
    """Why there are no faces."""
    shown: tuple[int, int] = (1, 1)
    """Size of the picture that :meth:`drawn` returned last."""
    _alone: tuple[int, Image.Image] | None = None

    @classmethod
    def open(cls, path: str, extractor: FaceExtractor, limits: Limits) -> Sitting:
        """Read a photo and look for faces. No face is a problem to report; a file that is no image raises BadImage."""
        from idgen.errors import NoFaceFound

        photo = limits.photo(path)
        try:
            return cls(path, photo, extractor.faces(photo))
        except NoFaceFound as error:
            return cls(path, photo, problem=str(error))

    def drawn(self) -> Image.Image:
        """The photo with its faces framed; where there are several, all but the picked one are dimmed."""
        scale = min(1.0, LARGEST / max(self.photo.size))
        zoom = 2 * scale * (max(1, SMALLEST // min(self.photo.size)))  # twice as large, so that lines come out smooth
        size = max(1, round(self.photo.width * zoom)), max(1, round(self.photo.height * zoom))
        picture = self.photo.resize(size, Image.Resampling.LANCZOS)
        line = max(3, round(min(size) / 110))
        boxes = [[float(value) * zoom for value in face.box] for face in self.faces]
        if len(boxes) > 1:
            shade = Image.new("L", size, 120)
            ImageDraw.Draw(shade).rounded_rectangle(boxes[self.pick], 4 * line, fill=0)
            picture.paste(DARK, mask=shade)
        draw = ImageDraw.Draw(picture)
        for i, box in enumerate(boxes):
            colour = ACCENT if i == self.pick else "white"
            draw.rounded_rectangle(box, 4 * line, outline=colour, width=line if i == self.pick else line // 2)
            if i == self.pick:
                for x, y in (self.faces[i].keypoints * zoom).tolist():
                    draw.ellipse(
                        (x - line, y - line, x + line, y + line), fill="white", outline=ACCENT, width=line // 2
                    )
        self.shown = max(1, size[0] // 2), max(1, size[1] // 2)
        return picture.resize(self.shown, Image.Resampling.LANCZOS)

    def pick_at(self, x: float, y: float) -> bool:
        """Pick the face at a point of the picture as drawn; whether one was there."""
        point = x * self.photo.width / self.shown[0], y * self.photo.height / self.shown[1]
        hit = [i for i, face in enumerate(self.faces) if _inside(point, face)]
        if hit:  # of two overlapping boxes the smaller is the one that cannot be reached otherwise
            self.pick = min(hit, key=lambda i: self.faces[i].area)
        return bool(hit)

    def portrait(self) -> Image.Image:
        """The photo with every other face blurred away.

        Each pipeline looks for the face again, with the recogniser it was trained on, and takes the largest. So what
        was picked here is told by leaving nobody else in the photo.
        """
        if len(self.faces) < 2:
            return self.photo
        if self._alone is None or self._alone[0] != self.pick:  # kept, for every portrait's request refers to it
            self._alone = self.pick, self._isolated()
        return self._alone[1]

    def _isolated(self) -> Image.Image:
        mask = Image.new("L", self.photo.size, 0)
        draw = ImageDraw.Draw(mask)
        for i, face in enumerate(self.faces):
            if i != self.pick:
                draw.rectangle(_grown(face, 0.25), fill=255)
        draw.rectangle(_grown(self.faces[self.pick], 0.1), fill=0)
        # Blurred so far that no feature is left, whatever the resolution.
        widest = max(float(face.box[2] - face.box[0]) for face in self.faces)
        return Image.composite(self.photo.filter(ImageFilter.BoxBlur(max(4.0, widest / 2))), self.photo, mask)


def describe(sittings: Sequence[Sitting]) -> str:
    """What was found, for the line below the photo (Markdown)."""
    if not sittings:
        return ""
    lost = [i for i, each in enumerate(sittings, 1) if not each.faces]
    if len(lost) == len(sittings):
        return "**No face found.** Use a photo in which the face is sharp, upright, well lit and not covered."
    crowd = any(len(each.faces) > 1 for each in sittings)
    found = sum(len(each.faces) for each in sittings)
    text = f"**{found} face{'s' if found > 1 else ''} found.**"
    if crowd:
        text += " Click the right one; the framed face is taken."
    if lost:
        text += f" Photo {', '.join(map(str, lost))} shows none and is left out."
    return text


def _inside(point: tuple[float, float], face: Face) -> bool:
    left, top, right, bottom = face.box
    return bool(left <= point[0] <= right and top <= point[1] <= bottom)


def _grown(face: Face, share: float) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(value) for value in face.box)
    dx, dy = (right - left) * share, (bottom - top) * share
    return left - dx, top - dy, right + dx, bottom + dy
