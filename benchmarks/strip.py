"""The README's picture: one photo, five prompts, and how alike each portrait is. ``python benchmarks/strip.py``"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import idgen

ROOT = Path(__file__).parent.parent
PEOPLE = ("ada", "cleo", "finn")
PROMPTS = (
    "a photo of a person, smiling, wearing a red shirt, blue background",
    "a photo of a person, looking left, wearing a green shirt, yellow background",
    "a photo of a person, wearing glasses, wearing a white shirt, purple background",
    "a photo of a person, laughing, wearing a blue hat, orange background",
    "a pencil sketch of a person, smiling",
)
SIDE, TEXT, GAP = 192, 40, 6


def strip(pipeline: str = "ip-adapter-faceid-plusv2", seed: int = 7) -> Image.Image:
    """Rows of one person each: the photo, then a portrait for each prompt with its likeness below."""
    pipe = idgen.load(pipeline, base="mini")
    rows = len(PEOPLE)
    sheet = Image.new("RGB", ((len(PROMPTS) + 1) * (SIDE + GAP) - GAP, rows * (SIDE + TEXT)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, name in enumerate(PEOPLE):
        photo = ROOT / "examples" / name / "1.png"
        cells = [(Image.open(photo).convert("RGB"), "the photo")]
        for prompt in PROMPTS:
            portrait = pipe.generate(photo, prompt, seed=seed)[0]
            score = portrait.likeness_note if portrait.likeness is None else f"likeness {portrait.likeness:.2f}"
            what, said = prompt.split(", ")[:2]
            label = said if what == "a photo of a person" else what
            cells.append((portrait.image, f"{label}\n{score}"))
        for column, (image, label) in enumerate(cells):
            x, y = column * (SIDE + GAP), row * (SIDE + TEXT)
            sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
            draw.text((x + 2, y + SIDE + 2), label, fill="black", font=font)
    return sheet


if __name__ == "__main__":
    target = ROOT / "docs" / "images" / "strip.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    strip().save(target, optimize=True)
    print(target)
