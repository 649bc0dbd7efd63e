"""The demo's own HTML: progress, details, what is missing, the table of a comparison. Everything shown is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from idgen.demo.offers import Offer
    from idgen.demo.session import Shot

STRONG, FAIR = 0.5, 0.3
"""Cosines from which a likeness is called strong or fair: photos of one person mostly lie above 0.4, of strangers
around 0 (see :mod:`idgen.embeddings`)."""

HEADER = """
<div id="brand">
  <svg viewBox="0 0 32 32" aria-hidden="true"><defs><linearGradient id="g" x1="0" y1="0" x2="1" y2="1">
  <stop stop-color="#8b5cf6"/><stop offset="1" stop-color="#ec4899"/></linearGradient></defs>
  <rect width="32" height="32" rx="9" fill="url(#g)"/><circle cx="16" cy="13" r="5.2" fill="#fff"/>
  <path d="M6.5 27c1-6 5-8.4 9.5-8.4s8.500 2.400 9.500 8.400" fill="#fff"/></svg>
  <div><h1>idgen</h1><p>One photo and a prompt in, portraits out that stay recognisably that person.</p></div>
</div>"""

EMPTY = """<div class="idgen-empty"><div class="idgen-empty-art"><i></i><i></i><i></i></div>
<p>Your portraits appear here.</p><span>Add a photo, say what to show, press Generate.</span></div>"""


def waiting(text: str) -> str:
    """Something has begun of which no progress is known."""
    return (
        f'<div class="idgen-work" data-state="waiting"><div class="idgen-line"><b>{escape(text)}</b></div>'
        '<div class="idgen-bar idgen-busy"><i></i></div></div>'
    )


def working(
    label: str, step: int, total: int, eta: float | None, previews: Sequence[Image.Image] = (), unit: str = "step"
) -> str:
    """Progress of a run, with what can be seen of its pictures so far."""
    pictures = "".join(f'<img class="idgen-preview" alt="preview" src="{data_uri(each)}">' for each in previews)
    left = "" if eta is None else f" · {duration(eta)} left"
    return (
        f'<div class="idgen-work" data-state="working" data-step="{step}" data-total="{total}">'
        f'<div class="idgen-line"><b>{escape(label)}</b><span>{unit} {step} of {total}{left}</span></div>'
        f'<div class="idgen-bar"><i style="width:{100 * step / max(total, 1):.1f}%"></i></div>'
        f'<div class="idgen-previews">{pictures}</div></div>'
    )


def finished(text: str, state: str = "done") -> str:
    """The last word on a run: ``done``, ``stopped`` or ``failed``."""
    line = f'<div class="idgen-line"><b>{escape(text)}</b></div>'
    return f'<div class="idgen-work idgen-{state}" data-state="{state}">{line}</div>'


def details(shot: Shot | None) -> str:
    """All about one portrait."""
    if shot is None:
        return ""
    record = shot.portrait.provenance.get("request", {})
    facts = [
        ("Pipeline", record.get("pipeline", shot.request.pipeline)),
        ("Seed", shot.portrait.seed),
        ("Size", f"{shot.portrait.image.width} × {shot.portrait.image.height}"),
        ("Steps", record.get("steps")),
        ("Guidance", record.get("guidance")),
        ("Time", f"{shot.seconds:.1f} s"),
    ]
    cells = "".join(f"<div><dt>{k}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts if v is not None)
    note = shot.portrait.likeness_note
    words = f'<p class="idgen-note">{escape(note[0].upper() + note[1:])}.</p>' if note else ""
    prompt = record.get("prompt") or ""
    return (
        f'<div class="idgen-details">{meter(shot.portrait.likeness)}{words}<dl>{cells}</dl>'
        f'<p class="idgen-prompt">{escape(prompt)}</p></div>'
    )


def meter(value: float | None) -> str:
    """A likeness as a bar."""
    if value is None:
        return '<div class="idgen-meter"><span>Likeness</span><div></div><b>not measured</b></div>'
    word = "strong" if value >= STRONG else "fair" if value >= FAIR else "weak"
    return (
        f'<div class="idgen-meter idgen-{word}" title="cosine of the face embeddings; {STRONG:g} and above is strong">'
        f'<span>Likeness</span><div><i style="width:{100 * min(max(value, 0), 1):.0f}%"></i></div>'
        f"<b>{value:.2f} · {word}</b></div>"
    )


def missing(offers: Sequence[Offer]) -> str:
    """The pipelines that cannot run here, and what each lacks."""
    rows = "".join(
        f"<li><b>{escape(offer.name)}</b><span>{escape(offer.description)}</span>"
        + (f"<code>{escape(offer.cure)}</code>" if offer.lacking else f"<span>{escape(offer.cure)}</span>")
        + "</li>"
        for offer in offers
        if not offer.ready
    )
    count = sum(not offer.ready for offer in offers)
    if not count:
        return ""
    words = f"{count} more pipeline{'s' if count > 1 else ''}, and what each lacks"
    return f'<details class="idgen-missing"><summary>{words}</summary><ul>{rows}</ul></details>'


def comparison(rows: Sequence[tuple[str, float | None, float | None, str]]) -> str:
    """A table of (pipeline, likeness, seconds, remark), in the order they ran."""
    measured = [row[1] for row in rows if row[1] is not None]
    best = max(measured) if measured else None
    body = "".join(
        f"<tr{' class=idgen-best' if likeness is not None and likeness == best else ''}><th>{escape(name)}</th>"
        f"<td>{meter(likeness) if not remark else f'<em>{escape(remark)}</em>'}</td>"
        f"<td>{'' if seconds is None else f'{seconds:.1f} s'}</td></tr>"
        for name, likeness, seconds, remark in rows
    )
    return f'<table class="idgen-table"><tr><th>Pipeline</th><th>Likeness</th><th>Time</th></tr>{body}</table>'


def rows(records: Sequence[dict[str, Any]]) -> str:
    """A table of a batch's records, failures first; the rest of a long one is in the zip."""
    shown = sorted(records, key=lambda record: record["file"] is not None)[:60]
    body = "".join(
        f"<tr><th>{record['row']}</th>"
        + (
            f"<td><em>line {record['line']}: {escape(str(record['error']))}</em></td><td></td>"
            if record["file"] is None
            else f"<td>{escape(str(record['request'].get('prompt') or ''))}</td><td>{meter(record['likeness'])}</td>"
        )
        + "</tr>"
        for record in shown
    )
    return (
        f'<table class="idgen-table"><tr><th>Row</th><th>Prompt</th><th>Likeness</th></tr>{body}</table>'
        if body
        else ""
    )


def duration(seconds: float) -> str:
    """A length of time for people: 8 s, 2 min 5 s."""
    whole = max(1, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def data_uri(picture: Any) -> str:
    """A small picture inside the page itself: previews are never written to a file that could be fetched."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
