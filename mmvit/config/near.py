"""Config keys that a user may have meant."""

import difflib
from typing import Any

from data_tools.core.near import nearest, plain
from mmvit.keys import declared

# What other libraries call a key.
_WORDS = {
    "train.steps": ("epochs", "num_epochs", "max_steps", "num_steps", "iterations", "total_steps", "num_train_epochs"),
    "train.batch_size": ("batch", "bs", "per_device_train_batch_size", "global_batch_size"),
    "train.micro_batches": ("accum_freq", "gradient_accumulation_steps", "grad_accum", "accumulate"),
    "train.precision": ("amp", "fp16", "bf16", "half", "mixed_precision", "dtype"),
    "train.init": ("pretrained", "weights", "finetune_from", "init_from", "model_path", "model_name_or_path", "ckpt"),
    "train.save_every": ("save_frequency", "save_steps", "checkpoint_every", "save_interval", "save_period"),
    "train.log_every": ("log_every_n_steps", "logging_steps", "log_interval"),
    "train.checkpointing": ("grad_checkpointing", "gradient_checkpointing"),
    "train.trackers": ("report_to", "wandb", "logger", "tensorboard"),
    "train.freeze": ("lock_image", "lock_text", "frozen"),
    "train.compile": ("torchcompile", "torch_compile"),
    "data.train": ("train_data", "dataset", "data", "train_dir", "data_dir", "data_path", "root", "shards"),
    "data.num_workers": ("workers", "jobs", "dataloader_num_workers"),
    "data.augment.crop_area": ("scale", "aug_scale", "crop"),
    "data.augment.flip": ("hflip", "fliplr"),
    "data.augment.timm_augment": ("aa", "auto_augment"),
    "data.augment.erase": ("reprob", "erasing"),
    "out": ("name", "logs", "output", "output_dir", "save_dir", "project", "run_name", "outdir"),
    "optim.lr": ("learning_rate", "lr0", "base_lr"),
    "optim.weight_decay": ("wd",),
    "optim.warmup_share": ("warmup", "warmup_steps", "warmup_epochs", "warmup_ratio", "warmup_t"),
    "optim.decay": ("lr_scheduler", "scheduler", "lr_scheduler_type", "sched"),
    "optim.name": ("optimizer", "opt"),
    "optim.betas": ("beta1", "beta2", "momentum"),
    "optim.clip_norm": ("grad_clip_norm", "clip_grad", "max_grad_norm", "grad_clip"),
    "optim.ema_decay": ("ema", "model_ema", "model_ema_decay"),
    "model.image.kind": ("model", "arch", "architecture", "backbone", "model_name", "vision_model"),
    "model.image.image_size": ("imgsz", "img_size", "resolution", "input_size", "force_image_size"),
    "model.text.context_length": ("max_length", "max_seq_length", "force_context_length"),
    "zero_shot.data": ("imagenet_val", "zeroshot"),
    "validation.data": ("val", "val_data", "eval_data", "val_dir", "test_data"),
    "validation.every": ("val_frequency", "eval_steps", "val_interval", "zeroshot_frequency"),
    "classes": ("class_names", "names", "num_classes", "nb_classes", "nc", "labels"),
    "loss.label_smoothing": ("smoothing",),
    "loss.kind": ("criterion", "siglip", "coca"),
}


def near_keys(config: Any, name: str) -> list[str]:
    """Return the keys of a config, at most three, that a dotted name or an option of another program may mean."""
    keys = list(declared(config() if isinstance(config, type) else config))
    outer, _, last = name.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == outer}
    if outer and nearest(last, siblings):
        return [siblings[str(nearest(last, siblings))]]
    same = [key for key in keys if plain(key.rpartition(".")[2]) == plain(last)]
    if same:
        return same[:3]
    for key, words in _WORDS.items():
        if key in keys and plain(last) in map(plain, words):
            return [key]
    near = difflib.get_close_matches(name, keys, n=1, cutoff=0.8)
    if near:
        return near
    word = nearest(last, [key.rpartition(".")[2] for key in keys])
    return [key for key in keys if key.rpartition(".")[2] == word][:3]
