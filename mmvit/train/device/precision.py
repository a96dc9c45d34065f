"""Choice of the number format by what the device supports in hardware."""

import os
import platform

import torch

from data_tools.core.errors import UsageError

OVERRIDE = "MMVIT_BF16_UNITS"


def has_bf16_units(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices in hardware.

    MMVIT_BF16_UNITS=0 or =1 in the environment overrides the detection; with 1, devices without units emulate bf16.
    """
    if override := _override():
        return override == "1"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        abilities = torch.cpu.get_capabilities()
        return bool(abilities.get("amx_bf16") or abilities.get("avx512_bf16"))
    return False


def choose_precision(requested: str, device: torch.device) -> tuple[str, str]:
    """Return the precision to use and the reason; raise UsageError if the requested bf16 would be emulated."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    units = has_bf16_units(device)
    source = f" ({OVERRIDE}={_override()})" if _override() else ""
    if requested == "auto":
        reason = f"{name} has {'' if units else 'no '}bfloat16 units{source}"
        if device.type == "cuda" and not units:  # where people expect fp16
            reason += "; fp16 is not supported"
        return ("bf16" if units else "fp32"), reason
    if requested.startswith("bf16") and not units:
        raise UsageError(
            f"{requested} was requested, but {name} has no bfloat16 units{source}",
            where="train.precision",
            note="bf16 would be emulated, many times slower than fp32",
            hint="use train.precision=auto or fp32; fp16 is not supported",
        )
    return requested, "as configured"


def _override() -> str:
    value = os.environ.get(OVERRIDE, "")
    if value not in ("", "0", "1"):
        raise UsageError(f"{OVERRIDE} is {value!r}", where="environment", hint=f"set {OVERRIDE} to 0 or 1, or unset it")
    return value
