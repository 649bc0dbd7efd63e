"""``idgen doctor``: what this machine has, what idgen chooses on it, and which pipelines can run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from idgen.doctor import Report


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False) -> None:
    """Check this machine: versions, devices, number format, providers, weights, pipelines. Uses no network.

    Exit code 0, or 1 when no pipeline can run.
    """
    from idgen.doctor import diagnose

    report = diagnose()
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        from rich.console import Console

        console = Console(highlight=False, soft_wrap=True)
        _machine(console, report)
        _weights(console, report)
        _pipelines(console, report)
        _problems(console, report)
    if not report.can_run:
        raise typer.Exit(1)


def _size(value: int | None) -> str:
    return "?" if value is None else f"{value / 2**30:.1f} GiB"


def _head(console: Console, title: str) -> None:
    console.print(f"\n[bold]{title}[/bold]")


def _line(console: Console, key: str, value: object, note: str = "") -> None:
    # markup=False: paths and messages may hold square brackets, as in idgen[cuda].
    console.print(f"  {key:<34} {value}" + (f"  {note}" if note else ""), markup=False)


def _machine(console: Console, report: Report) -> None:
    _head(console, "Versions")
    for key, value in report.versions.items():
        _line(console, key, value)
    for package in report.packages:
        if package.extra is None or package.version:
            _line(console, package.name, package.version or "missing", package.cure)
    absent: dict[str, list[str]] = {}
    for package in report.packages:
        if package.extra and not package.version:
            absent.setdefault(package.extra, []).append(package.name)
    for extra, names in absent.items():
        _line(console, f"optional: {extra}", f"without {', '.join(names)}", f'pip install "idgen[{extra}]"')
    _head(console, "Devices")
    for device in report.devices:
        facts = [device.description]
        if device.memory_total is not None:
            facts.append(f"{_size(device.memory_free)} of {_size(device.memory_total)} free")
        if device.compute_capability:
            facts.append(f"compute capability {device.compute_capability}")
        if device.bf16 is not None:
            facts.append("bf16 in hardware" if device.bf16 else "no bf16 in hardware")
        _line(console, device.name, "; ".join(facts))
    if report.choice:
        _line(console, "idgen chooses", f"{report.choice['device']}: {report.choice['device_reason']}")
        _line(console, "", f"{report.choice['dtype']}: {report.choice['dtype_reason']}")
        _line(console, "", f"attention {report.choice['attention']}: {report.choice['attention_reason']}")
    if report.onnxruntime:
        ort = report.onnxruntime
        _line(console, "onnxruntime providers", ", ".join(ort["providers"]))
        _line(console, "onnxruntime on CUDA", "yes" if ort["cuda_loads"] else f"no: {ort['reason']}")


def _weights(console: Console, report: Report) -> None:
    if not report.weights:
        return
    facts = report.weights
    _head(console, "Weights")
    _line(console, "here", ", ".join(facts["present"]) or "none of the manifest's")
    _line(console, "mini model set", facts["mini"] or "not in this copy of idgen")
    _line(console, "Hugging Face cache (HF_HOME)", facts["hub_cache"], f"{_size(facts['hub_cache_free'])} free")
    _line(console, "idgen's own (IDGEN_HOME)", facts["idgen_home"], f"{_size(facts['idgen_home_free'])} free")
    _line(console, "offline (HF_HUB_OFFLINE)", "yes" if facts["offline"] else "no")
    _line(console, "commercial only", "yes" if facts["commercial_only"] else "no")


def _pipelines(console: Console, report: Report) -> None:
    _head(console, "Pipelines")
    for state in report.pipelines:
        _line(console, state.name, f"runs on {', '.join(state.runs_on)}" if state.runs_on else "cannot run")
        for base, why in state.refused.items():
            _line(console, "", f"{base}: refused, {why}")
        for base, lacking in state.lacks.items():
            _line(console, "", f"{base}: lacks {', '.join(lacking)}")
            _line(console, "", f"  {state.cures[base]}")


def _problems(console: Console, report: Report) -> None:
    _head(console, "Problems" if report.problems else "No problems found.")
    for problem in report.problems:
        console.print(f"  - {problem}", markup=False)
