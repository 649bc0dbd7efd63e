"""Results as JSON, as a Markdown table and as a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from idgen.errors import BadRequest

NOT_SHOWN = ("part", "axis", "value", "max_error_in_std", "provider")
"""What a table says elsewhere, or only the JSON holds."""


def save(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``speed-SUITE.json``, ``.md`` and, where matplotlib is installed, ``.png``; returns what was written."""
    written = save_text(results, folder)
    picture = written[0].with_suffix(".png")
    if any(_in_plot(row) for row in results["rows"]):
        try:
            plot(results, picture)
            written.append(picture)
        except ImportError:
            pass
    return written


def save_text(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``speed-SUITE.json`` and ``.md``, each in one step: a process that is killed leaves the last whole one."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"speed-{results['suite']}"
    written = [stem.with_suffix(".json"), stem.with_suffix(".md")]
    for path, text in zip(written, (json.dumps(results, indent=1) + "\n", markdown(results))):
        draft = path.with_suffix(path.suffix + ".part")
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    return written


def load(folder: Path, suite: str) -> dict[str, Any] | None:
    """What `save` wrote, or ``None`` where there is nothing yet.

    Raises `BadRequest` for a file that holds anything else.
    """
    path = folder / f"speed-{suite}.json"
    if not path.is_file():
        return None
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"rows", "done", "machine"} <= results.keys():
            raise ValueError("rows, done or machine is missing")
    except (OSError, ValueError, AttributeError) as error:
        raise BadRequest(f"{path} holds no results ({error}); move it away to start anew.", "resume") from None
    return results


def markdown(results: dict[str, Any]) -> str:
    """A page with a table for each kind of row."""
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items() if value is not None)
    lines = [f"# Speed, {results['suite']} suite", "", f"{machine}. Clock: {results['clock']}.", ""]
    against_stock = [row for row in results["rows"] if "size" in row]
    lines += _cpu_tables(against_stock)
    titles = dict.fromkeys(row.get("part") for row in results["rows"] if "size" not in row)
    for title in titles:
        lines += [f"## {title}", ""] if title else []
        lines += [*_table([row for row in results["rows"] if "size" not in row and row.get("part") == title]), ""]
    if results.get("not_reached"):
        lines += ["Not reached within the time: " + ", ".join(results["not_reached"]) + ".", ""]
    return "\n".join(lines).rstrip() + "\n"


def _cpu_tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for size, steps in dict.fromkeys((row["size"], row["steps"]) for row in rows):
        lines += [
            f"## {size}, {steps} steps",
            "",
            "| pipeline | variant | times the baseline's speed | quartiles | A/A noise | ms a step | baseline "
            "| latent error: max / std | relative L2 | target, stretch |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in (r for r in rows if (r["size"], r["steps"]) == (size, steps)):
            ratio, target = row["ratio"], row.get("target")
            lines.append(
                f"| {row['kind']} | {row['variant']} | {ratio['median']:.2f} | {ratio['low']:.2f}-{ratio['high']:.2f} "
                f"| {ratio['noise_low']:.2f}-{ratio['noise_high']:.2f} | {row['ms_a_step']:.1f} "
                f"| {row['baseline_ms_a_step']:.1f} | {row['max_error_in_std']:.1e} | {row['relative_l2_error']:.1e} "
                f"| {f'{target[0]}, {target[1]}' if target else ''} |"
            )
        lines.append("")
    return lines


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """A column for every number that any row has."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in NOT_SHOWN]
    columns = [name for name in columns if any(row.get(name) is not None for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _in_plot(row: dict[str, Any]) -> bool:
    """Comparisons with the main baseline: no growth, and no kernel against another."""
    return isinstance(row.get("ratio"), dict) and "axis" not in row and "against" not in row["variant"]


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of the ratio to the baseline with quartiles; the grey band is the A/A noise.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if _in_plot(row)]
    groups = list(dict.fromkeys((row.get("size", ""), row["kind"]) for row in rows))
    counts = [sum((r.get("size", ""), r["kind"]) == group for r in rows) for group in groups]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(9, sum(counts) * 0.32 + len(groups) * 1.0), height_ratios=counts, squeeze=False,
        layout="constrained", sharex=True,
    )  # fmt: skip
    for axis, group in zip(axes[:, 0], groups):
        chosen = [row for row in rows if (row.get("size", ""), row["kind"]) == group][::-1]
        ratios = [row["ratio"] for row in chosen]
        medians = [r["median"] for r in ratios]
        spread = [[max(0, r["median"] - r["low"]) for r in ratios], [max(0, r["high"] - r["median"]) for r in ratios]]
        colours = ["#2a6f97" if row["variant"].startswith("exact") else "#c98a3a" for row in chosen]
        axis.barh([row["variant"] for row in chosen], medians, xerr=spread, color=colours, ecolor="#333", height=0.65)
        axis.axvspan(min(r["noise_low"] for r in ratios), max(r["noise_high"] for r in ratios), color="#999", alpha=0.4)
        axis.axvline(1, color="#333", linewidth=0.8)
        for number, median in enumerate(medians):
            # White inside the bar's root, where neither an error bar nor the noise band is in the way.
            axis.text(0.04, number, f"{median:.2f}", va="center", color="white", fontsize=8)
        axis.set_title(", ".join(part for part in group if part), loc="left", fontsize=10)
        axis.tick_params(labelsize=8)
    # Once, at the end: a limit stops matplotlib from making room for the longer bars of later groups.
    axes[0, 0].set_xlim(left=0)
    axes[-1, 0].set_xlabel(
        "times the baseline's speed (blue: exact, brown: approximate, grey: baseline against itself)"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
