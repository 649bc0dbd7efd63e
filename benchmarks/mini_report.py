"""The table and the plot of ``mini_quality.py``."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

PIPELINES = ("ip-adapter-faceid-plusv2", "instantid", "arc2face")
GATES = {"own": 0.35, "rank1": 0.50}
"""What mini must reach to be the default."""
GOALS = {
    "own_share": 0.75,
    "rank1": 0.85,
    "colours": 0.90,
    "looks": 0.70,
    "pose": 4.0,
    "psnr": 30.0,
    "kept": 0.90,
    "seconds": 3.0,
}
NOTES = {"glasses": "colours", "hat": "colours", "hat_colour": "colours", "shirt": "colours", "background": "colours",
         "expression": "looks", "pose": "looks", "style": "looks"}  # fmt: skip


def _mark(good: bool) -> str:
    return "yes" if good else "no"


def _likeness(part: dict[str, Any]) -> list[str]:
    real = part["real renders"]
    most = max(r["portraits"] for r in part.values())
    lines = [
        f"## Likeness ({real['people']} held-out people, up to {most} portraits for each pipeline)",
        "",
        "Cosine by the scorer, face found in the picture by the detector; a picture without a face counts as 0.",
        "",
        "| | portraits | own | others | share of real | rank-1 | face found | gate | goal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in part.items():
        share = r["own"] / real["own"]
        gate = _mark(r["own"] >= GATES["own"] and r["rank1"] >= GATES["rank1"]) if r is not real else ""
        goal = _mark(share >= GOALS["own_share"] and r["rank1"] >= GOALS["rank1"]) if r is not real else ""
        cells = [
            name,
            str(r["portraits"]),
            f"{r['own']:.3f}",
            f"{r['others']:.3f}",
            f"{share:.0%}",
            f"{r['rank1']:.1%}",
            f"{r['found']:.1%}",
        ]
        lines.append("| " + " | ".join([*cells, gate, goal]) + " |")
    lines += [
        "",
        "Gate: own >= 0.35, others near 0, rank-1 >= 50 %. Goal: own >= 75 % of real renders, rank-1 >= 85 %.",
        "",
    ]
    return lines


def _prompts(part: dict[str, Any]) -> list[str]:
    lines = [
        "## Prompts obeyed (ip-adapter-faceid-plusv2)",
        "",
        f"{part['portraits'] * 3 // 4} random prompts in the photo style, {part['portraits'] // 4} in drawn styles,",
        "read by classifiers trained on renders: the expression off the aligned face, all else off the whole picture.",
        "`real`: what they read right on real renders of the same prompts.",
        "",
        "| attribute | photo | real | drawn styles | real | goal | reached |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, value in part["photo_obeyed"].items():
        goal = GOALS.get(NOTES.get(name, ""))
        styles, limit = (part.get(f"styles_{k}", {}).get(name) for k in ("obeyed", "reader"))
        cells = [f"{v:.1%}" if v is not None else "" for v in (value, part["photo_reader"][name], styles, limit)]
        judged = styles if name == "style" else value
        reached = _mark(judged >= goal) if goal is not None and judged is not None else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {f'{goal:.0%}' if goal is not None else ''} | {reached} |")
    return [*lines, ""]


def _rest(results: dict[str, Any]) -> list[str]:
    lines = ["## Structure, autoencoder, speed", "", "| | measured | goal | reached |", "|---|---|---|---|"]
    if pose := results.get("pose"):
        good = pose["with"] < GOALS["pose"] and pose["with"] < pose["without"] / 2
        lines += [
            f"| keypoint error with IdentityNet (faces found {pose['with_found']:.0%}) | {pose['with']:.2f} px of 128 "
            f"| < 4 px, < half of without | {_mark(good)} |",
            f"| without IdentityNet (found {pose['without_found']:.0%}) | {pose['without']:.2f} px | | |",
            f"| the detector's own error on real renders | {pose['detector']:.2f} px | | |",
        ]
    if auto := results.get("autoencoder"):
        lines += [
            f"| autoencoder PSNR | {auto['psnr']:.1f} dB | >= 30 dB | {_mark(auto['psnr'] >= GOALS['psnr'])} |",
            f"| likeness kept through encode-decode | {auto['kept']:.1%} "
            f"({auto['own_before']:.3f} to {auto['own_after']:.3f}) | >= 90 % "
            f"| {_mark(auto['kept'] >= GOALS['kept'])} |",
        ]
    if speed := results.get("speed"):
        for name, r in speed.items():
            if isinstance(r, dict):
                lines.append(
                    f"| warm portrait, {name}, 20 steps, {speed['threads']} thread(s) | {r['portrait']:.2f} s | < 3 s "
                    f"| {_mark(r['portrait'] < GOALS['seconds'])} |"
                )
    return [*lines, ""]


def _plot(curve: dict[str, Any], likeness: dict[str, Any] | None, path: Path) -> None:
    """Likeness and rank-1 over the scale, drawn with Pillow."""
    points = sorted((float(k), v) for k, v in curve.items() if isinstance(v, dict))
    lines: list[tuple[str, str, list[tuple[float, float]]]] = [
        ("cosine to the person", "#1f6fb4", [(s, v["own"]) for s, v in points]),
        ("cosine to others", "#888888", [(s, v["others"]) for s, v in points]),
        ("rank-1", "#2b9c3e", [(s, v["rank1"]) for s, v in points]),
    ]
    if likeness:
        real = likeness["own"]
        lines.append(("cosine of real renders", "#9ec5e6", [(points[0][0], real), (points[-1][0], real)]))
    wide, high, left, low, top = 720, 420, 60, 50, 40
    image = Image.new("RGB", (wide, high), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    first, last = points[0][0], points[-1][0]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first)
        return left + across * (wide - left - 190), high - low - (y + 0.05) / 1.05 * (high - low - top)

    draw.text(
        (left, 12),
        f"mini: likeness over identity_scale, {curve['portraits'] // len(points)} held-out portraits each",
        "black",
        font,
    )
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1.0):
        draw.line([at(first, tick), at(last, tick)], "#dddddd")
        draw.text((left - 32, at(first, tick)[1] - 8), f"{tick:.1f}", "black", font)
    for scale, _ in points:
        draw.text((at(scale, 0)[0] - 10, high - low + 6), f"{scale:g}", "black", font)
    draw.text((at((first + last) / 2, 0)[0] - 40, high - 24), "identity_scale", "black", font)
    for row, (name, colour, values) in enumerate(lines):
        draw.line([at(*p) for p in values], colour, 3)
        for x, y in (at(*p) for p in values):
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], colour)
        draw.text((wide - 175, top + 20 * row), name, colour, font)
    image.save(path)


def write_report(results: dict[str, Any], out: Path) -> None:
    """Write ``mini_quality.md`` and, when the curve was measured, ``mini_quality.png``."""
    lines = [
        "# mini: measured quality",
        "",
        "Made by `python benchmarks/mini_quality.py`; numbers in `mini_quality.json`.",
        "",
    ]
    likeness = {k: results[k] for k in ("real renders", *PIPELINES) if k in results}
    if "real renders" in likeness:
        lines += _likeness(likeness)
    if "prompts" in results:
        lines += _prompts(results["prompts"])
    lines += _rest(results)
    if curve := results.get("curve"):
        points = sorted((float(k), v) for k, v in curve.items() if isinstance(v, dict))
        own = [v["own"] for _, v in points]
        to_one = [o for (s, _), o in zip(points, own) if s <= 1]
        rising = all(b > a for a, b in pairwise(to_one))
        lines += [
            "## Identity scale",
            "",
            f"{curve['portraits'] // len(points)} portraits at each scale, the same people, seeds and prompts.",
            "",
            "| scale | " + " | ".join(f"{s:g}" for s, _ in points) + " |",
            "|---" * (len(points) + 1) + "|",
            "| own | " + " | ".join(f"{v['own']:.3f}" for _, v in points) + " |",
            "| rank-1 | " + " | ".join(f"{v['rank1']:.0%}" for _, v in points) + " |",
            "",
            f"Rises with every step up to 1: {_mark(rising)}. ![curve](mini_quality.png)",
            "",
        ]
        _plot(curve, results.get("real renders"), out / "mini_quality.png")
    (out / "mini_quality.md").write_text("\n".join(lines).rstrip() + "\n")
