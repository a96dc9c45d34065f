"""Low-rank adapters: W x + (alpha / rank) B A x with W frozen (Hu et al. 2022, section 4.1), through peft."""

import importlib.util
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from data_tools.core.errors import UsageError, did_you_mean
from mmvit.config import LoraConfig

TARGETS = ("q", "k", "v", "out", "up", "down")
TOWERS = ("image_tower.", "text_tower.")
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(model: nn.Module, config: LoraConfig, frozen: Sequence[str] = ()) -> None:
    """Put adapters on the named linear maps of all blocks of both towers; rank 0 adds none.

    From here on the towers' own parameters are frozen. What stands outside them (projections, logit scale and bias,
    further heads) goes on being trained: it is small, and `freeze` can name it; adapters whose names fit a pattern of
    `frozen` are not trained either. At the start an adapter adds nothing, as B is zero; A is drawn from torch's random
    state.

    Raises:
        UsageError: peft is not installed, or there is no such map.
    """
    if not config.rank:
        return
    for target in config.targets:
        if target not in TARGETS:
            hint = did_you_mean(target, TARGETS) or f"choose from {', '.join(TARGETS)}"
            raise UsageError(f"there is no linear map {target!r} in a block", where="lora.targets", hint=hint)
    if importlib.util.find_spec("peft") is None:
        hint = "pip install 'mmvit[lora]', or lora.rank=0"
        raise UsageError("adapters need peft, which is not installed", where="lora.rank", hint=hint)
    import peft

    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(TOWERS)
        and ".blocks." in name
        and name.rpartition(".")[2] in config.targets
    ]
    if not names:
        what = "the towers have no transformer blocks whose linear maps could be adapted"
        raise UsageError(what, where="lora.rank", hint="lora.rank=0, or a ViT or Swin")
    outside = [p for name, p in model.named_parameters() if not name.startswith(TOWERS) and p.requires_grad]
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=names)  # type: ignore[arg-type]
    peft.inject_adapter_in_model(settings, model)
    for parameter in outside:  # peft freezes all that is no adapter
        parameter.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in frozen):
            parameter.requires_grad_(False)


def merge_adapters(state: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Return a state dict of the model without adapters that computes the same; one without adapters stays as it is.

    Args:
        state: the state dict of a model with adapters, or an average of such.
        config: the one that they were added with.
    """
    merged = {}
    for name, tensor in state.items():
        if name.endswith((DOWN, UP)):
            continue
        linear = name.removesuffix(f"{BASE}weight")
        if linear != name and linear + DOWN in state:
            change = state[linear + UP].float() @ state[linear + DOWN].float() * (config.alpha / config.rank)
            tensor = (tensor.float() + change).to(tensor.dtype)
        merged[name.replace(BASE, ".")] = tensor
    return merged
