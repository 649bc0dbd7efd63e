"""Results as JSON, as a Markdown table and as a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def save(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``speed-SUITE.json``, ``.md`` and, where matplotlib is installed, ``.png``; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"speed-{results['suite']}"
    written = [stem.with_suffix(".json"), stem.with_suffix(".md")]
    written[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    written[1].write_text(markdown(results), encoding="utf-8")
    try:
        plot(results, stem.with_suffix(".png"))
        written.append(stem.with_suffix(".png"))
    except ImportError:
        pass
    return written


def markdown(results: dict[str, Any]) -> str:
    """A page with one table a model size."""
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items() if value is not None)
    lines = [f"# Speed, {results['suite']} suite", "", f"{machine}. Clock: {results['clock']}.", ""]
    if any("ms_a_step" in row and "size" in row for row in results["rows"]):
        lines += _cpu_tables(results["rows"])
    else:
        lines += _gpu_table(results["rows"])
    if results.get("not_reached"):
        lines += ["", "Not reached within the time: " + ", ".join(results["not_reached"]) + "."]
    return "\n".join(lines) + "\n"


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


def _gpu_table(rows: list[dict[str, Any]]) -> list[str]:
    names: tuple[str, ...] = (
        "kind",
        "variant",
        "s",
        "p95_s",
        "ms_a_step",
        "images_s",
        "ratio",
        "tflop_s",
        "share_of_floor",
        "peak_gib",
    )
    names += ("relative_l2_error", "count", "target", "error")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        shown = {**row, "kind": row.get("kind", row.get("part", ""))}
        lines.append("| " + " | ".join(_cell(shown.get(name)) for name in names) + " |")
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of the ratio to the baseline with quartiles; the grey band is the A/A noise.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if isinstance(row.get("ratio"), dict)]
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
        axis.set_xlim(left=0)
    axes[-1, 0].set_xlabel(
        "times the baseline's speed (blue: exact, brown: approximate, grey: baseline against itself)"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
