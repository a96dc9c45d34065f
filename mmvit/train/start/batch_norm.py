"""Settings that are incompatible with BatchNorm, whose layers keep running statistics of the batches."""

from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from data_tools.core.errors import UsageError
from mmvit.config import PretrainConfig, RunConfig


def check_batch_norm(model: nn.Module, config: RunConfig) -> None:
    """Raise UsageError for settings with which the running statistics would silently be wrong or updated twice."""
    names = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if not names:
        return
    train = config.train
    frozen = [name for name in names if any(fnmatchcase(f"{name}.weight", pattern) for pattern in train.freeze)]
    settings = {
        "train.precision=bf16_params": train.precision == "bf16_params",
        "train.checkpointing": train.checkpointing != "none",
        "train.micro_batches": isinstance(config, PretrainConfig) and train.micro_batches > 1,
        "train.freeze": bool(frozen),
        "lora.rank": config.lora.rank > 0,
    }
    for key, wanted in settings.items():
        if wanted:
            raise UsageError(
                f"the model has BatchNorm ({(frozen or names)[0]}), which is incompatible with {key}",
                where=key,
                note="its running statistics would be changed by mistake, or updated twice",
                hint=f"remove {key.partition('=')[0]}, or choose a tower with LayerNorm or GroupNorm",
            )


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
