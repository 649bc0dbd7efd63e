"""The contact sheet: one HTML page that opens from disk, without a server and without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any
from urllib.parse import quote

from idgen.batch.results import DONE

MOST = 10_000
"""Pictures on the page; beyond it browsers get slow, and ``results.jsonl`` is the better tool."""

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%(title)s</title>
<style>
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 0; }
header { position: sticky; top: 0; z-index: 1; padding: .8rem 1.2rem; background: Canvas;
  border-bottom: 1px solid color-mix(in srgb, CanvasText 18%%, Canvas); }
h1 { font-size: 1.05rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
form { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; }
select { font: inherit; padding: .2rem .4rem; margin-left: .4rem; max-width: 16rem; }
output { margin-left: auto; opacity: .75; }
main { display: grid; gap: 1rem; padding: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); }
figure { margin: 0; border-radius: 8px; overflow: hidden;
  border: 1px solid color-mix(in srgb, CanvasText 15%%, Canvas); }
figure[hidden] { display: none; }
img { display: block; width: 100%%; aspect-ratio: 1; object-fit: contain; background: #8883; }
figcaption { padding: .5rem .7rem .7rem; }
.who { display: flex; justify-content: space-between; gap: .5rem; font-weight: 600; }
.who span:first-child { overflow-wrap: anywhere; }
.likeness { font-variant-numeric: tabular-nums; }
.about { opacity: .7; font-size: .85em; overflow-wrap: anywhere; }
.prompt { margin: .2rem 0; overflow-wrap: anywhere; display: -webkit-box; -webkit-line-clamp: 3;
  -webkit-box-orient: vertical; overflow: hidden; }
details { padding: 0 1.2rem 1.2rem; }
td, th { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top; overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; }
summary { cursor: pointer; font-weight: 600; }
</style>
<header>
<h1>%(title)s</h1>
<form>
<label>Sort by<select id="sort">
<option value="row">row</option><option value="high">likeness, best first</option>
<option value="low">likeness, worst first</option></select></label>
<label>Person<select id="person"><option value="">all</option>%(people)s</select></label>
<label>Pipeline<select id="pipeline"><option value="">all</option>%(pipelines)s</select></label>
<output id="count"></output>
</form>
</header>
<main>
%(cards)s
</main>
%(failed)s
<script>
"use strict";
const main = document.querySelector("main"), form = document.querySelector("form");
const cards = [...main.children], pick = id => document.getElementById(id).value;
// Unmeasured pictures come last either way.
const worth = (card, sign) => card.dataset.likeness === "" ? Infinity : sign * card.dataset.likeness;
const orders = {
  row: (a, b) => a.dataset.row - b.dataset.row,
  high: (a, b) => worth(a, -1) - worth(b, -1) || orders.row(a, b),
  low: (a, b) => worth(a, 1) - worth(b, 1) || orders.row(a, b),
};
function show() {
  const person = pick("person"), pipeline = pick("pipeline");
  let shown = 0;
  for (const card of cards) {
    card.hidden = (person && card.dataset.person !== person) || (pipeline && card.dataset.pipeline !== pipeline);
    shown += !card.hidden;
  }
  main.append(...[...cards].sort(orders[pick("sort")]));
  document.getElementById("count").value = shown + " of " + cards.length + " pictures";
}
form.addEventListener("input", show);
show();
</script>
</html>
"""


def contact_sheet(records: Iterable[dict[str, Any]], title: str) -> str:
    """The page for the records of ``results.jsonl``; picture names are relative to the page's folder."""
    cards: list[str] = []
    failed: list[str] = []
    people: dict[str, None] = {}
    pipelines: dict[str, None] = {}
    left_out = 0
    for record in records:
        if record.get("status") != DONE:
            if len(failed) < MOST:
                failed.append(_failure(record))
        elif len(cards) == MOST:
            left_out += 1
        else:
            people[str(record["person"])] = pipelines[str(record["pipeline"])] = None
            cards.append(_card(len(cards), record))
    if left_out:
        title = f"{title}: the first {MOST} pictures; {left_out} more are in the folder"
    return _PAGE % {
        "title": escape(title),
        "people": _options(people),
        "pipelines": _options(pipelines),
        "cards": "\n".join(cards),
        "failed": _failures(failed),
    }


def _options(values: Iterable[str]) -> str:
    return "".join(f"<option>{escape(value)}</option>" for value in sorted(values))


def _card(position: int, record: dict[str, Any]) -> str:
    likeness, request = record.get("likeness"), record.get("request") or {}
    shown = "–" if likeness is None else f"{likeness:.3f}"
    why = f' title="{escape(str(record["likeness_note"]))}"' if record.get("likeness_note") else ' title="likeness"'
    file = quote(str(record["file"]))
    prompt = escape(str(request.get("prompt") or ""))
    data = {
        "row": position,
        "likeness": "" if likeness is None else likeness,
        "person": record["person"],
        "pipeline": record["pipeline"],
    }
    attributes = " ".join(f'data-{name}="{escape(str(value))}"' for name, value in data.items())
    return (
        f'<figure {attributes}><a href="{file}"><img loading="lazy" src="{file}" alt="{prompt}"></a><figcaption>'
        f'<div class="who"><span>{escape(str(record["person"]))}</span><span class="likeness"{why}>{shown}</span></div>'
        f'<p class="prompt" title="{prompt}">{prompt}</p>'
        f'<div class="about">{escape(str(record["pipeline"]))}, seed {record["seed"]}, line {record["line"]}</div>'
        "</figcaption></figure>"
    )


def _failure(record: dict[str, Any]) -> str:
    return f"<tr><td>line {escape(str(record.get('line')))}</td><td>{escape(str(record.get('error')))}</td></tr>"


def _failures(rows: list[str]) -> str:
    if not rows:
        return ""
    return f"<details open><summary>{len(rows)} failed</summary><table>{''.join(rows)}</table></details>"
