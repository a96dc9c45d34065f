"""Optimisers, what each of them updates and how fast, and their state as tensors."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from data_tools.core.errors import CheckpointError, UsageError
from mmvit.config import OptimConfig
from mmvit.train.optim.muon import Muon

# Tables and tokens that are added, not multiplied: decay would pull them to zero for nothing.
NO_DECAY = (
    *("positions", "class_token", "registers", "_bias", "logit_scale"),
    *("pos_embed", "cls_token", "dist_token", "reg_token", "bias_table"),  # as timm names them
)
# What stands before a tower's first block.
STEM = ("embed", "token_embedding", "positions", "class_token", "distillation_token", "registers", "pre_norm")
BLOCK = re.compile(r"(\w+_tower)\.(?:blocks|relative)\.(\d+)\.")


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[Optimizer]:
    """Make one optimiser over all parameters that are trained, or Muon over the hidden matrices and AdamW beside it."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = layer_factors([name for name, _ in model.named_parameters()], config.layer_decay)
    matrices = {name: p for name, p in named.items() if config.name == "muon" and is_hidden_matrix(name, p)}
    rest = {name: p for name, p in named.items() if name not in matrices}
    optimizer = _build_optimizer(_groups(rest, factors, config.lr, config.weight_decay), config)
    if not matrices:
        return [optimizer]
    groups = _groups(matrices, factors, config.muon_lr, config.muon_weight_decay)
    muon = Muon([group for group in groups if group["params"]], config.muon_lr, momentum=config.muon_momentum)
    return [muon, optimizer]


def _build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    betas = (config.betas[0], config.betas[1])
    if config.name == "sgd":
        return SGD(groups, lr=config.lr, momentum=betas[0], foreach=True)
    kind = {"stable_adamw": StableAdamW, "lamb": Lamb}.get(config.name, AdamW)
    # foreach and fused equal the plain loop up to rounding; fused is one kernel a group.
    return kind(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def _groups(
    named: Mapping[str, nn.Parameter], factors: Mapping[str, float], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups for each rate, highest first: what decays, and what does not."""
    plain = {name for name, p in named.items() if p.ndim < 2 or name.endswith(NO_DECAY)}
    return [
        {"params": [named[name] for name in named if factors[name] == factor and (name in plain) == is_plain]}
        | {"lr": lr * factor, "weight_decay": 0.0 if is_plain else weight_decay, "adapts": not is_plain}
        for factor in sorted({1.0} | {factors[name] for name in named}, reverse=True)
        for is_plain in (False, True)
    ]


def layer_factors(names: Iterable[str], layer_decay: float | None) -> dict[str, float]:
    """Factor of each parameter's rate: d^(depth - k) for block k of a tower, d^(depth + 1) below, 1 above and beside.

    Clark et al. 2020, section 3.1, with the numbering of BEiT (Bao et al. 2022).
    """
    factors = dict.fromkeys(names, 1.0)
    if layer_decay is None:
        return factors
    towers = {tower for tower in ("image_tower", "text_tower") if any(name.startswith(f"{tower}.") for name in factors)}
    for tower in sorted(towers):
        if not any(name.startswith(f"{tower}.blocks.") for name in factors):
            what = f"the {tower.replace('_', ' ')} has no row of blocks, along which rates could decay"
            raise UsageError(what, where="optim.layer_decay", hint="optim.layer_decay=null, or a ViT or Swin")
    blocks = {name: (found[1], int(found[2])) for name in factors if (found := BLOCK.match(name))}
    depths = {tower: max(k for t, k in blocks.values() if t == tower) + 1 for tower, _ in blocks.values()}
    for name in factors:
        tower, part = (name + ".").split(".")[:2]
        if name in blocks:
            factors[name] = layer_decay ** (depths[tower] - blocks[name][1])
        elif tower in depths and part in STEM:
            factors[name] = layer_decay ** (depths[tower] + 1)
    return factors


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Tell whether Muon is meant for it: matrices and kernels, but no embedding of pixels or tokens, and no classifier.

    Measured on the quickstart at 30,000 samples, top-1 of an unseen vendor: blocks alone 16 %, with kernels 19 %.
    """
    if name.endswith(NO_DECAY):
        return False
    if parameter.ndim == 4:
        return parameter.shape[1] > 3
    return parameter.ndim == 2 and any(part in name for part in ("blocks.", ".pool.", "_projection.weight"))


class RescaledAdamW(AdamW):
    """AdamW whose step in each tensor is multiplied by a factor; the state is AdamW's, and so are the bits at 1.

    Written here because the packages' versions cannot be resumed from tensors of parameters alone: they count steps
    elsewhere (timm's LAMB, optimi, pytorch_optimizer). Or they leave weight decay out of the factor (timm's AdamW).
    None has a fused kernel. The price of using torch's is a copy of the weights during a step.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        before = {p: p.clone() for group in self.param_groups for p in group["params"] if p.grad is not None}
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in before:
                    factor = self.factor(parameter, before[parameter], group)
                    parameter.lerp_(before[parameter], 1 - factor)
        return loss

    def factor(self, parameter: Tensor, before: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the factor [] for a parameter that went from `before` to where it is now."""
        raise NotImplementedError


class StableAdamW(RescaledAdamW):
    """AdamW with update clipping: a step is divided by the RMS of g / sqrt(v) over its tensor, where that exceeds 1.

    Wortsman et al. 2023, algorithm 2: v lags behind gradients that grow suddenly, and the loss then spikes.
    """

    def factor(self, parameter: Tensor, before: Tensor, group: dict[str, Any]) -> Tensor:
        """Return 1 / max(1, RMS)."""
        assert parameter.grad is not None
        state = self.state[parameter]
        # v starts at zero; in float32 the first differences would lose up to four digits.
        correction = (1 - group["betas"][1] ** state["step"].double()).float()
        variance = state["exp_avg_sq"].clamp(min=group["eps"] ** 2 * correction)
        mean_square = parameter.grad.square().div_(variance).mean() * correction
        return mean_square.clamp(min=1).rsqrt()


class Lamb(RescaledAdamW):
    """LAMB: a step is as long as the rate times the length of its tensor (You et al. 2020, algorithm 2).

    As in NVIDIA's version, norms, biases, tokens and other tables take AdamW's own step.
    """

    def factor(self, parameter: Tensor, before: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the trust ratio; 1 for a tensor that is zero or has not moved."""
        length, way = group["lr"] * before.norm(), (before - parameter).norm()
        adapted = (length > 0) & (way > 0) & group["adapts"]
        return torch.where(adapted, length / way, 1.0)


def set_learning_rates(optimizers: list[Optimizer], factor: float) -> None:
    """Set each group's rate to its peak times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            peak = group.setdefault("peak_lr", group["lr"])
            group["lr"] = peak * factor


def flatten_state(optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Collect all optimiser tensors under flat names, "OPTIMIZER.PARAMETER.ENTRY", for a safetensors file."""
    return {
        f"{i}.{index}.{entry}": torch.as_tensor(value)
        for i, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for entry, value in state.items()
    }


def restore_state(optimizers: list[Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `flatten_state` collected; the optimisers must have been built from the same config.

    Raises:
        CheckpointError: a tensor belongs to no parameter, or to one of another shape; nothing was changed.
    """
    shapes = {
        f"{i}.{index}": parameter.shape
        for i, optimizer in enumerate(optimizers)
        for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])
    }
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, value in tensors.items():
        owner, _, entry = name.rpartition(".")
        if owner not in shapes or value.shape not in (shapes[owner], torch.Size()):
            raise CheckpointError(
                "the optimiser's state does not fit the model",
                where=f"{name} of shape {tuple(value.shape)} in optimizer.safetensors",
                note="nothing was changed",
                hint="bring back the config that the checkpoint was made with, or start anew with another out=FOLDER",
            )
        number, index = owner.split(".")
        states[int(number)].setdefault(int(index), {})[entry] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
