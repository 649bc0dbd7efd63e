"""Compute the peak memory of full-size models on the meta device and write it beside the other results.

    python benchmarks/speed_memory.py

Takes some minutes and about 2 GiB; needs no GPU and no weights.
"""

from __future__ import annotations

import json
from pathlib import Path

from idgen.bench.memory import card_peak, peaks

CASES = {
    "InstantID on SDXL": ("sdxl", True, 1024),
    "IP-Adapter on SDXL": ("sdxl", False, 1024),
    "IP-Adapter on SD1.5": ("sd15", False, 512),
}


def main() -> None:
    """Write ``results/speed-memory.json``."""
    table = {}
    for title, (name, instantid, pixels) in CASES.items():
        for lean in (True, False):
            parts = peaks(name, instantid, pixels, lean)
            totals = {
                "resident": card_peak(parts),
                "resident, VAE by tiles": card_peak(parts, vae_tiling=True),
                "offload=model, VAE by tiles": card_peak(parts, offload="model", vae_tiling=True),
                "offload=sequential, VAE by tiles": card_peak(parts, offload="sequential", vae_tiling=True),
            }
            rounded = lambda table: {key: round(value, 2) for key, value in table.items()}  # noqa: E731
            table[f"{title}, lean={lean}"] = {"parts_gib": rounded(parts), "peak_gib": rounded(totals)}
    path = Path(__file__).parent / "results" / "speed-memory.json"
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
