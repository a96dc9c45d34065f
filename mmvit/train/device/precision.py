"""Which number format a machine multiplies fastest."""

import platform

import torch

from data_tools.core.errors import UsageError


def has_bf16_units(device: torch.device) -> bool:
    """Tell whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        abilities = torch.cpu.get_capabilities()
        return bool(abilities.get("amx_bf16") or abilities.get("avx512_bf16"))
    return False


def choose_precision(wish: str, device: torch.device) -> tuple[str, str]:
    """Return what `wish` comes to, and why in words; raises UsageError for bf16 where it would be emulated."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    units = has_bf16_units(device)
    if wish == "auto":
        return ("bf16", f"{name} has bfloat16 units") if units else ("fp32", f"{name} has no bfloat16 units")
    if wish.startswith("bf16") and not units:
        raise UsageError(
            f"{wish} was asked for, but {name} has no units for it",
            where="train.precision",
            note="bf16 would be emulated, many times slower than fp32",
            hint="train.precision=auto",
        )
    return wish, "as configured"
