"""Weights of open_clip's CLIP under the names of `DualEncoder`."""

import re
from collections.abc import Mapping

from torch import Tensor

from data_tools.errors import CheckpointError

_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_BLOCK_PARTS = {
    "ln_1": "attention_norm",
    "attn.out_proj": "attention.out",
    "ln_2": "feed_forward_norm",
    "mlp.c_fc": "feed_forward.up",
    "mlp.c_proj": "feed_forward.down",
}
_MODULES = {
    "visual.conv1": "image_tower.embed.projection",
    "visual.ln_pre": "image_tower.pre_norm",
    "visual.ln_post": "image_tower.norm",
    "token_embedding": "text_tower.token_embedding",
    "ln_final": "text_tower.norm",
}
_PARAMETERS = {
    "visual.class_embedding": "image_tower.class_token",
    "visual.positional_embedding": "image_tower.positions",
    "positional_embedding": "text_tower.positions",
    "logit_scale": "logit_scale",
}
# open_clip multiplies from the right: features @ projection.
_TRANSPOSED = {"visual.proj": "image_projection.weight", "text_projection": "text_projection.weight"}


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an open_clip `CLIP` with a ViT; the packed query, key and value become three.

    Raises:
        CheckpointError: a weight that a `DualEncoder` has no place for. One that is missing shows on loading.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        renamed |= _rename(name, tensor)
    return renamed


def _rename(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name in _PARAMETERS:
        return {_PARAMETERS[name]: tensor}
    if name in _TRANSPOSED:
        return {_TRANSPOSED[name]: tensor.T}
    module, _, kind = name.rpartition(".")  # kind: "weight" or "bias"
    if module in _MODULES:
        return {f"{_MODULES[module]}.{kind}": tensor}
    if block := _BLOCK.fullmatch(name):
        prefix = f"{'image' if block[1] else 'text'}_tower.blocks.{block[2]}"
        if block[3].startswith("attn.in_proj_"):
            kind = block[3].removeprefix("attn.in_proj_")
            return {
                f"{prefix}.attention.{part}.{kind}": rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)
            }
        part, _, kind = block[3].rpartition(".")
        if part in _BLOCK_PARTS:
            return {f"{prefix}.{_BLOCK_PARTS[part]}.{kind}": tensor}
    raise CheckpointError(
        f"weight {name!r} has no place in a dual encoder",
        where=name,
        meaning="the checkpoint is of another architecture than CLIP with a ViT",
    )
