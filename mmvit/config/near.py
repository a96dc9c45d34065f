"""Config keys that a user may have meant."""

import difflib
from typing import Any

from data_tools.core.near import nearest, plain
from mmvit.keys import declared

# What other libraries call a key; the words of an image tower are those of a text tower too.
_WORDS = {
    "train.steps": "epochs num_epochs max_steps num_steps iterations total_steps num_train_epochs max_epochs n_epochs",
    "train.batch_size": "batch bs batchsize per_device_train_batch_size global_batch_size train_batch_size",
    "train.micro_batches": "accum_freq gradient_accumulation_steps grad_accum accumulate accum_iter accum_steps",
    "train.precision": "amp fp16 bf16 half mixed_precision dtype",
    "train.init": "pretrained weights finetune_from init_from model_path model_name_or_path ckpt checkpoint finetune",
    "train.save_every": "save_frequency save_steps checkpoint_every save_interval save_period save_freq",
    "train.log_every": "log_every_n_steps logging_steps log_interval print_freq",
    "train.keep_last": "save_total_limit keep delete_previous_checkpoint",
    "train.checkpointing": "grad_checkpointing gradient_checkpointing",
    "train.trackers": "report_to wandb logger tensorboard",
    "train.freeze": "lock_image lock_text frozen lock",
    "train.compile": "torchcompile torch_compile",
    "data.train": "train_data dataset data train_dir data_dir data_path path dir folder root shards urls url",
    "data.num_workers": "workers jobs dataloader_num_workers nworkers",
    "data.augment.crop_area": "scale aug_scale crop",
    "data.augment.flip": "hflip fliplr",
    "data.augment.timm_augment": "aa auto_augment randaugment",
    "data.augment.brightness": "color_jitter jitter",
    "data.augment.erase": "reprob erasing random_erasing",
    "out": "name logs output output_dir save_dir project run_name outdir log_dir exp experiment",
    "optim.lr": "learning_rate lr0 base_lr blr",
    "optim.weight_decay": "wd",
    "optim.warmup_share": "warmup warmup_steps warmup_epochs warmup_ratio warmup_t",
    "optim.decay": "lr_scheduler scheduler lr_scheduler_type sched schedule lr_schedule",
    "optim.name": "optimizer opt",
    "optim.betas": "beta1 beta2 momentum adam_beta1 adam_beta2",
    "optim.eps": "epsilon adam_epsilon",
    "optim.clip_norm": "grad_clip_norm clip_grad max_grad_norm grad_clip gradient_clip_val",
    "optim.ema_decay": "ema model_ema model_ema_decay",
    "lora.rank": "lora lora_r",
    "model.image.kind": "model arch architecture backbone model_name vision_model",
    "model.image.image_size": "imgsz img_size resolution input_size force_image_size",
    "model.image.depth": "layers num_layers num_hidden_layers n_layer blocks",
    "model.image.num_heads": "heads num_attention_heads n_head",
    "model.image.width": "hidden_size dim hidden_dim d_model",
    "model.image.drop_path": "drop dropout stochastic_depth drop_path_rate attention_dropout",
    "model.embed_dim": "projection_dim embedding_dim embed",
    "model.initial_logit_scale": "temperature temp tau logit_scale init_logit_scale",
    "model.text.context_length": "max_length max_seq_length force_context_length seq_len",
    "validation.data": "val val_data eval eval_data val_dir test_data valid eval_dataset",
    "zero_shot.data": "val val_data eval eval_data val_dir test_data imagenet_val zeroshot",
    "validation.every": "val_frequency eval_steps val_interval eval_freq",
    "zero_shot.every": "zeroshot_frequency eval_steps val_frequency eval_freq",
    "classes": "class_names names num_classes nb_classes nc labels",
    "loss.label_smoothing": "smoothing",
    "loss.kind": "criterion siglip coca",
    "mix.mixup": "mixup_alpha",
}
# What is no key here.
_NOTES = {
    "device devices gpu gpus num_gpus ngpus cuda": "CUDA_VISIBLE_DEVICES=0 chooses a GPU; for several write accelerate "
    "launch -m mmvit instead of mmvit",
    "csv_caption_key csv_img_key csv_separator caption_key img_key dataset_type": "data.train=SHARDS takes what "
    "mmvit-data make SOURCE OUT writes, which reads tables and folders",
}


def note(name: str) -> str:
    """Return what to do about a setting of another program that is none here, "" if nothing is known."""
    return next((text for words, text in _NOTES.items() if plain(name) in map(plain, words.split())), "")


def near_keys(config: Any, name: str) -> list[str]:
    """Return the keys of a config, at most three, that a dotted name or an option of another program may mean."""
    keys = list(declared(config() if isinstance(config, type) else config))
    outer, _, last = name.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == outer}
    known = [key for key, words in _WORDS.items() if plain(last) in map(plain, words.split())]
    here = [siblings[key.rpartition(".")[2]] for key in known if key.rpartition(".")[2] in siblings]
    near = nearest(last, siblings) if outer else None
    known = [key for key in known if key in keys]
    same = [key for key in keys if plain(key.rpartition(".")[2]) == plain(last)]
    for found in (here, [siblings[near]] if near else [], known, same):
        if found:
            return found[:3]
    whole = difflib.get_close_matches(name, keys, n=1, cutoff=0.8)
    words = {plain(key.rpartition(".")[2]): key.rpartition(".")[2] for key in keys}
    close = difflib.get_close_matches(plain(last), list(words), n=1, cutoff=0.75)
    return whole or [key for key in keys if close and key.rpartition(".")[2] == words[close[0]]][:3]
