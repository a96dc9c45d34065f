"""Import of transformers models: ViT, DeiT, Swin and CvT, with or without their heads, and CLIP."""

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import PIL.Image
import torch.nn.functional as F
from torch import Tensor

from data_tools.core.errors import CheckpointError, UsageError
from mmvit.data.tokenizers import TOKENIZER_FILE, TokenizerConfig
from mmvit.data.transforms import PreprocessConfig
from mmvit.interop.imported import Imported, Names, activation_name, cannot_open, rename_weights
from mmvit.models.classifier import ClassifierConfig
from mmvit.models.dual_encoder import DualEncoderConfig
from mmvit.towers.contract import TowerConfig
from mmvit.towers.cvt import CvTConfig
from mmvit.towers.swin import SwinConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig

_UNUSED = ("pooler.", "mask_token")  # in names of weights that towers do not use
_UNSUPPORTED = {"DeiTForImageClassification": "its head uses only one of the two tokens"}
_BLOCKS: Names = {
    r"attention\.o_proj\.": "attention.out.",
    r"attention\.([qkv])_proj\.": r"attention.\1.",
    r"layernorm_before\.": "attention_norm.",
    r"layernorm_after\.": "feed_forward_norm.",
    r"mlp\.fc1\.": "feed_forward.up.",
    r"mlp\.fc2\.": "feed_forward.down.",
}
VIT_NAMES: Names = {
    r"^(vit|deit)\.": "",
    r"^embeddings\.cls_token": "class_token",
    r"^embeddings\.distillation_token": "distillation_token",
    r"^embeddings\.position_embeddings": "positions",
    r"^embeddings\.mask_token": "",
    r"^embeddings\.patch_embeddings\.": "embed.",
    r"^layers\.": "blocks.",
    r"^layernorm\.": "norm.",
    r"^pooler\..*": "",
    r"^(cls_)?classifier\.": "head.",
    r"^distillation_classifier\.": "distillation_head.",
    **_BLOCKS,
}
CVT_NAMES: Names = {
    r"^(cvt\.)?encoder\.": "",
    r"^layernorm\.": "norm.",
    r"^classifier\.": "head.",
    r"embedding\.convolution_embeddings\.": "embed.",
    r"embed\.normalization": "embed.norm",
    r"cls_token": "class_token",
    r"\.layers\.": ".blocks.",
    r"attention\.attention\.": "attention.",
    r"attention\.output\.dense": "attention.out",
    r"convolution_projection_(.)\w+\.convolution_projection\.convolution": r"\1_neighbours.0",
    r"convolution_projection_(.)\w+\.convolution_projection\.normalization": r"\1_neighbours.1",
    r"attention\.projection_(.)\w+": r"attention.\1",
    r"layernorm_before": "attention_norm",
    r"layernorm_after": "feed_forward_norm",
    r"intermediate\.dense": "feed_forward.up",
    r"output\.dense": "feed_forward.down",
}
CLIP_NAMES: Names = {
    r"^vision_model\.embeddings\.class_embedding": "image_tower.class_token",
    r"^vision_model\.embeddings\.patch_embedding": "image_tower.embed.projection",
    r"^vision_model\.embeddings\.position_embedding\.weight": "image_tower.positions",
    r"^vision_model\.pre_layrnorm": "image_tower.pre_norm",
    r"^vision_model\.post_layernorm": "image_tower.norm",
    r"^text_model\.embeddings\.token_embedding": "text_tower.token_embedding",
    r"^text_model\.embeddings\.position_embedding\.weight": "text_tower.positions",
    r"^text_model\.final_layer_norm": "text_tower.norm",
    r"^vision_model\.encoder\.layers": "image_tower.blocks",
    r"^text_model\.encoder\.layers": "text_tower.blocks",
    r"^visual_projection": "image_projection",
    r"self_attn\.out_proj": "attention.out",
    r"self_attn\.([qkv])_proj": r"attention.\1",
    r"layer_norm1": "attention_norm",
    r"layer_norm2": "feed_forward_norm",
    r"mlp\.fc1": "feed_forward.up",
    r"mlp\.fc2": "feed_forward.down",
}


def swin_names(depths: list[int]) -> Names:
    """Return the names of a Swin, whose blocks are numbered across stages here; `depths` are those of its stages."""
    first = [0, *accumulate(depths)]  # number of each stage's first block
    return {
        r"^swin\.": "",
        r"^encoder\.layers\.(\d)\.blocks\.(\d+)\.": lambda m: f"blocks.{first[int(m[1])] + int(m[2])}.",
        r"^encoder\.layers\.(\d)\.downsample\.": lambda m: f"blocks.{first[int(m[1]) + 1]}.merge.",
        r"^embeddings\.patch_embeddings\.": "embed.",
        r"^embeddings\.norm\.": "pre_norm.",
        r"^embeddings\.mask_token": "",
        r"^layernorm\.": "norm.",
        r"^classifier\.": "head.",
        r"attention\.relative_position_bias\.relative_position_bias_table": "relative_positions",
        r".*relative_position_index": "",
        **_BLOCKS,
    }


def load_transformers(name: str) -> list[Imported]:
    """Load a model of the Hugging Face Hub, or a folder that transformers wrote.

    Raises:
        UsageError: the model does not exist or is not supported, or transformers is not installed.
    """
    source = f"hf:{name}"
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise UsageError(f"{source} needs transformers", where=source, hint="pip install 'mmvit[hf]'") from error
    _check_folder(Path(name), source)
    try:
        config: Any = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        processor: Any = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers, the hub client and config validation raise many kinds
        raise cannot_open(source, error) from error
    kind, architecture = config.model_type, (config.architectures or [""])[0]
    is_classifier = "ImageClassification" in architecture
    if kind != "clip" and kind not in _KINDS:
        what = f"model type {kind!r} is not supported; supported are clip, {', '.join(_KINDS)}"
        raise UsageError(what, where=source, hint="timm has the same weights for many models: timm:NAME")
    if architecture in _UNSUPPORTED or (kind == "cvt" and not is_classifier):
        what = f"a {architecture} is not supported: {_UNSUPPORTED.get(architecture, 'it has no last norm')}"
        raise UsageError(what, where=source)
    preprocess, resizing = _preprocess(processor, source), _resizing(processor)
    try:
        loader: Any = getattr(transformers, architecture) if is_classifier else transformers.AutoModel
        options = {"use_safetensors": True, "dtype": "float32", "trust_remote_code": False}
        model, info = loader.from_pretrained(name, output_loading_info=True, **options)
        tokenizer = _tokenizer_folder(name) if kind == "clip" else ""
    except Exception as error:
        raise cannot_open(source, error) from error
    missing = [weight for weight in info["missing_keys"] if not any(part in weight for part in _UNUSED)]
    if missing:
        what = f"the checkpoint lacks weights of a {architecture}: {missing[0]}, {len(missing)} in total"
        raise CheckpointError(what, where=source)
    model.eval()
    if kind == "clip":
        return [_clip(model, preprocess, resizing, tokenizer, source)]
    tower_config, names = _KINDS[kind]
    tower, weights = tower_config(config, source), rename_weights(model.state_dict(), names(config))
    if kind == "cvt":  # its config has no image size
        tower.image_size = processor.size.get("shortest_edge") or processor.size["height"]
    if is_classifier:
        class_names = [str(config.id2label.get(i, i)) for i in range(config.num_labels)]
        made = ClassifierConfig(tower), weights, preprocess, resizing
        return [Imported(*made, lambda images: model(pixel_values=images).logits, class_names)]
    return [Imported(tower, weights, preprocess, resizing, lambda x: _pooled(model(pixel_values=x), kind))]


def _check_folder(folder: Path, source: str) -> None:
    if not folder.exists() and folder.parent != Path() and folder.parent.exists():  # else it may be a name on the Hub
        raise UsageError("the folder does not exist", where=source, hint="check the path")
    if folder.exists() and not (folder / "preprocessor_config.json").is_file():
        what = "preprocessor_config.json is missing, which defines the normalisation of pixels"
        hint = "write it with the model's image processor in transformers: processor.save_pretrained(FOLDER)"
        raise UsageError(what, where=source, hint=hint)


def _pooled(output: Any, kind: str) -> Tensor:
    """Return the input of a classification head."""
    return output.pooler_output if kind == "swin" else output.last_hidden_state[:, 0]


def vit_config(config: Any, where: str) -> ViTConfig:
    """Return our config of a ViT, or of a DeiT, which has a distillation token in transformers with any head."""
    return ViTConfig(
        image_size=_side(config.image_size),
        patch_size=_side(config.patch_size),
        pre_norm=False,
        patch_bias=True,
        init="vit",
        distilled=config.model_type == "deit",
        **_blocks(config, where),
    )


def swin_config(config: Any, where: str) -> SwinConfig:
    """Return our config of a Swin."""
    return SwinConfig(
        image_size=_side(config.image_size),
        patch_size=_side(config.patch_size),
        width=config.embed_dim,
        depths=list(config.depths),
        num_heads=list(config.num_heads),
        window_size=config.window_size,
        mlp_ratio=config.mlp_ratio,
        activation=activation_name(config.hidden_act, where),
        norm_eps=config.layer_norm_eps,
    )


def cvt_config(config: Any, where: str) -> CvTConfig:
    """Return our config of a CvT; that of transformers has no image size, and its epsilon is not used."""
    return CvTConfig(
        widths=list(config.embed_dim),
        depths=list(config.depth),
        num_heads=list(config.num_heads),
        patch_sizes=list(config.patch_sizes),
        strides=list(config.patch_stride),
        mlp_ratio=config.mlp_ratio[0],
        qkv_bias=config.qkv_bias[0],
    )


_KINDS: dict[str, tuple[Callable[[Any, str], TowerConfig], Callable[[Any], Names]]] = {
    "vit": (vit_config, lambda config: VIT_NAMES),
    "deit": (vit_config, lambda config: VIT_NAMES),
    "swin": (swin_config, lambda config: swin_names(config.depths)),
    "cvt": (cvt_config, lambda config: CVT_NAMES),
}


def _clip(model: Any, preprocess: PreprocessConfig, resizing: str, tokenizer: str, where: str) -> Imported:
    image, text = model.config.vision_config, model.config.text_config
    # Checkpoints with id 2 predate this key; their texts are pooled at the largest id.
    end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    config = DualEncoderConfig(
        model.config.projection_dim,
        image=ViTConfig(
            image_size=_side(image.image_size), patch_size=_side(image.patch_size), **_blocks(image, where)
        ),
        text=TextConfig(text.vocab_size, text.max_position_embeddings, end, **_blocks(text, where)),
    )
    return Imported(
        config,
        rename_weights(model.state_dict(), CLIP_NAMES),
        preprocess,
        resizing,
        lambda images: F.normalize(model.visual_projection(model.vision_model(pixel_values=images).pooler_output)),
        tokenizer=TokenizerConfig("file", tokenizer),
        answer_text=lambda ids: F.normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output)),
    )


def _tokenizer_folder(name: str) -> str:
    """Return the folder of a model's tokenizer.json, downloading it if necessary."""
    from transformers.utils.hub import cached_file

    found: Any = cached_file(name, TOKENIZER_FILE)
    for more in ("tokenizer_config.json", "special_tokens_map.json"):
        cached_file(name, more, _raise_exceptions_for_missing_entries=False)
    return str(Path(found).parent)


def _blocks(config: Any, where: str) -> dict[str, Any]:
    return {
        "width": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "activation": activation_name(config.hidden_act, where),
        "norm_eps": config.layer_norm_eps,
    }


def _side(size: int | list[int] | tuple[int, int]) -> int:
    return size if isinstance(size, int) else size[0]


def _preprocess(processor: Any, where: str) -> PreprocessConfig:
    if (
        not getattr(processor, "do_rescale", True)
        or abs(getattr(processor, "rescale_factor", 1 / 255) - 1 / 255) > 1e-9
    ):
        raise UsageError("the image processor does not rescale pixels to [0, 1]", where=where)
    if not getattr(processor, "do_normalize", True):
        return PreprocessConfig([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    if processor.image_mean is None or processor.image_std is None:
        raise UsageError("the image processor has no mean and standard deviation for pixels", where=where)
    return PreprocessConfig(list(processor.image_mean), list(processor.image_std))


def _resizing(processor: Any) -> str:
    size = dict(processor.size or {})
    how = "shorter side" if "shortest_edge" in size else "squash"
    crop = ", then center crop" if getattr(processor, "do_center_crop", False) else ""
    return (
        f"{how} to {next(iter(size.values()), '?')} px{crop}, {PIL.Image.Resampling(processor.resample).name.lower()}"
    )
