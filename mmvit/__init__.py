"""Train and use CLIP-style image-text models on WebDataset shards.

Models:
    load(folder)                                    an encoder of images and texts from a model folder
    zero_shot_classifier(encoder, names, templates) an image classifier from class names
    load_classifier(folder)                         a trained image classifier

Training:
    load_config(PretrainConfig, "quickstart", ["train.steps=10"])   the config of `pretrain`
    load_finetune_config("finetune/digits_vit")                     the config of `finetune`
    pretrain(config), finetune(config)                              train, and return the model folder

Importing this package does not import torch; the first use of a name does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "FinetuneConfig",
    "PretrainConfig",
    "finetune",
    "load",
    "load_classifier",
    "load_config",
    "load_finetune_config",
    "pretrain",
    "zero_shot_classifier",
]

if TYPE_CHECKING:
    from mmvit.checkpoint import load_classifier
    from mmvit.config import FinetuneConfig, PretrainConfig, load_config
    from mmvit.eval.encoder import load
    from mmvit.eval.zero_shot import zero_shot_classifier
    from mmvit.train.loop import finetune, pretrain
    from mmvit.train.start.config import load_finetune_config


_MODULES = {
    "FinetuneConfig": "mmvit.config",
    "PretrainConfig": "mmvit.config",
    "finetune": "mmvit.train.loop",
    "load": "mmvit.eval.encoder",
    "load_classifier": "mmvit.checkpoint",
    "load_config": "mmvit.config",
    "load_finetune_config": "mmvit.train.start.config",
    "pretrain": "mmvit.train.loop",
    "zero_shot_classifier": "mmvit.eval.zero_shot",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mmvit' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
