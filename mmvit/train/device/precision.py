"""Which number format a machine multiplies fastest."""

import os
import platform

import torch

from data_tools.core.errors import UsageError

OVERRIDE = "MMVIT_BF16_UNITS"


def has_bf16_units(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices in hardware.

    MMVIT_BF16_UNITS=0 or =1 in the environment overrides the detection; with 1, bf16 is emulated where there are none.
    """
    if override := _override():
        return override == "1"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        abilities = torch.cpu.get_capabilities()
        return bool(abilities.get("amx_bf16") or abilities.get("avx512_bf16"))
    return False


def choose_precision(wish: str, device: torch.device) -> tuple[str, str]:
    """Return the precision that `wish` resolves to and the reason; raise UsageError for bf16 that would be emulated."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    units = has_bf16_units(device)
    source = f" ({OVERRIDE}={_override()})" if _override() else ""
    if wish == "auto":
        return ("bf16" if units else "fp32"), f"{name} has {'' if units else 'no '}bfloat16 units{source}"
    if wish.startswith("bf16") and not units:
        raise UsageError(
            f"{wish} was asked for, but {name} has no units for it{source}",
            where="train.precision",
            note="bf16 would be emulated, many times slower than fp32",
            hint="train.precision=auto",
        )
    return wish, "as configured"


def _override() -> str:
    value = os.environ.get(OVERRIDE, "")
    if value not in ("", "0", "1"):
        raise UsageError(f"{OVERRIDE} is {value!r}", where="environment", hint=f"set {OVERRIDE} to 0 or 1, or unset it")
    return value
