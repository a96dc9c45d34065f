"""The parts that all benchmarks share: the machine's name, ratios of interleaved rounds, and the JSON report."""

import json
import os
import platform
import statistics
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def machine() -> str:
    """Return the GPU's name, or the processor's name and its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def spread(numerators: Iterable[float], denominators: Iterable[float]) -> dict[str, float]:
    """Return median, least and greatest of the ratios within each round."""
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    return {"median": statistics.median(ratios), "least": ratios[0], "greatest": ratios[-1]}


def write_report(path: Path, content: Mapping[str, Any], libraries: Iterable[str] = ()) -> None:
    """Write the figures as JSON, with date, machine and the versions of Python, torch and `libraries`."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("torch", *libraries)}
    facts = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "threads": torch.get_num_threads()}
    path.write_text(json.dumps(facts | {"versions": versions} | dict(content), indent=1) + "\n")
