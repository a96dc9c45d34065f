"""One run's configuration: composed from the dataclasses next to the code, loaded, overridden, validated, saved."""

from mmvit.config.builtin import BuiltinConfig, builtin_configs, find_config
from mmvit.config.files import check_files
from mmvit.config.finetune import ClassLossConfig, FinetuneConfig, ValidationConfig
from mmvit.config.load import (
    CONFIG,
    OPEN_KEYS,
    START,
    from_tree,
    in_run_folder,
    load_config,
    read_tree,
    to_yaml,
)
from mmvit.config.pretrain import LossConfig, PairsConfig, PretrainConfig, ZeroShotConfig
from mmvit.config.run import LoraConfig, OptimConfig, RunConfig, TrainConfig

__all__ = [
    "CONFIG",
    "OPEN_KEYS",
    "START",
    "BuiltinConfig",
    "ClassLossConfig",
    "FinetuneConfig",
    "LoraConfig",
    "LossConfig",
    "OptimConfig",
    "PairsConfig",
    "PretrainConfig",
    "RunConfig",
    "TrainConfig",
    "ValidationConfig",
    "ZeroShotConfig",
    "builtin_configs",
    "check_files",
    "find_config",
    "from_tree",
    "in_run_folder",
    "load_config",
    "read_tree",
    "to_yaml",
]
