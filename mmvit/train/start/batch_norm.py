"""BatchNorm, whose layers keep running statistics of the batches: in which mode it runs, and what it excludes."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from data_tools.core.errors import UsageError
from mmvit.config import PretrainConfig, RunConfig


def train_mode(model: nn.Module) -> None:
    """Put a model into training mode, except BatchNorm layers whose parameters are all frozen.

    These normalise with their running statistics and do not update them. A frozen layer without parameters is frozen
    with the module that holds it.
    """
    model.train()
    for _, layer, parent in _layers(model):
        parameters = list(layer.parameters()) or list(parent.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            layer.eval()


def check_batch_norm(model: nn.Module, config: RunConfig) -> None:
    """Raise UsageError for settings with which running statistics would silently be wrong or updated twice.

    Layers that `train.freeze` freezes have no part in this: their statistics do not change.
    """
    train = config.train
    named = {name: _frozen_share(name, layer, parent, train.freeze) for name, layer, parent in _layers(model)}
    live = [name for name, share in named.items() if share < 1]
    partial = [name for name, share in named.items() if 0 < share < 1]
    settings = {
        "train.precision=bf16_params": list(named) if train.precision == "bf16_params" else [],
        "train.checkpointing": live if train.checkpointing != "none" else [],
        "train.micro_batches": live if isinstance(config, PretrainConfig) and train.micro_batches > 1 else [],
        "train.freeze": partial,
        "lora.rank": live if config.lora.rank > 0 else [],
    }
    for key, names in settings.items():
        if names:
            raise UsageError(
                f"the model has BatchNorm ({names[0]}), which is incompatible with {key}"
                + (" of a part of its parameters" if key == "train.freeze" else ""),
                where=key,
                note="its running statistics would be changed by mistake, or updated twice",
                hint=f"remove {key.partition('=')[0]}, freeze the whole layer (train.freeze=[{names[0]}.*]), "
                "or choose a tower with LayerNorm or GroupNorm",
            )


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield name, layer and parent module of each BatchNorm."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, _BatchNorm):
            yield name, module, modules[name.rpartition(".")[0]]


def _frozen_share(name: str, layer: nn.Module, parent: nn.Module, patterns: Sequence[str]) -> float:
    """Return the fraction of the layer's parameters, or without any of its parent's, whose names match a pattern."""
    above = name.rpartition(".")[0]
    names = [f"{name}.{each}" for each, _ in layer.named_parameters()]
    names = names or [f"{above}.{each}" if above else each for each, _ in parent.named_parameters()]
    matching = [any(fnmatchcase(each, pattern) for pattern in patterns) for each in names]
    return sum(matching) / max(len(matching), 1)


def check_share(model: nn.Module, share: int) -> None:
    """Raise UsageError for a trained BatchNorm whose statistics would be those of a single image.

    Args:
        model: with its frozen parameters.
        share: samples of a rank in a micro-batch.
    """
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    trained = [name for name, module in norms if any(each.requires_grad for each in module.parameters())]
    if share == 1 and trained:
        raise UsageError(
            f"the model has BatchNorm ({trained[0]}), and each rank has a single image in a micro-batch",
            where="train.batch_size",
            note="its statistics would be those of one image, and a map of one pixel has none",
            hint="increase train.batch_size or decrease train.micro_batches",
        )
