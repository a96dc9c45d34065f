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
    """Add adapters to the named linear layers of all blocks of both towers; rank 0 adds none.

    The parameters of the towers are frozen. Parameters outside the towers (projections, logit scale and bias, further
    heads) remain trained unless `freeze` names them; adapters whose names match a pattern of `frozen` are not trained.
    B starts at zero, so that adapters initially change nothing; A is drawn from the random state of torch.

    Raises:
        UsageError: peft is not installed, or a target does not exist.
    """
    if not config.rank:
        return
    for target in config.targets:
        if target not in TARGETS:
            hint = did_you_mean(target, TARGETS) or f"choose from {', '.join(TARGETS)}"
            raise UsageError(f"unknown linear layer {target!r}", where="lora.targets", hint=hint)
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
        what = "the towers have no transformer blocks to adapt"
        raise UsageError(what, where="lora.rank", hint="use lora.rank=0, or a ViT or Swin")
    outside = [p for name, p in model.named_parameters() if not name.startswith(TOWERS) and p.requires_grad]
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=names)  # type: ignore[arg-type]
    peft.inject_adapter_in_model(settings, model)
    for parameter in outside:  # peft freezes all other parameters
        parameter.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in frozen):
            parameter.requires_grad_(False)


def merge_adapters(state: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Return the equivalent state dict of the model without adapters; one without adapters is unchanged.

    Args:
        state: the state dict of a model with adapters, or its EMA weights.
        config: the config of the adapters.
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
