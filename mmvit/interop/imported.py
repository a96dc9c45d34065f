"""Common form of models of other libraries, for the import."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from data_tools.core.errors import UsageError
from mmvit.data.tokenizers import TokenizerConfig
from mmvit.data.transforms import PreprocessConfig
from mmvit.layers.feed_forward import Activation
from mmvit.models.classifier import ClassifierConfig
from mmvit.models.dual_encoder import DualEncoderConfig
from mmvit.towers.contract import TowerConfig

Names = Mapping[str, str | Callable[["re.Match[str]"], str]]
# Names of activations in other libraries, in their configs or as a class.
_ACTIVATIONS: dict[str, Activation] = {
    **{"gelu": "gelu", "GELU": "gelu", "quick_gelu": "quick_gelu", "QuickGELU": "quick_gelu"},
    **{"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "GELUTanh": "gelu_tanh"},
}


class Imported(NamedTuple):
    """A model of another library: config and weights in our form, and functions that compute its original outputs.

    Args:
        config: its type is the kind of model: a dual encoder, a classifier, or an image tower.
        weights: weights under our names; of a classifier, those of the tower, and "head.", "distillation_head.".
        preprocess: image preprocessing.
        resizing: description of the other library's resizing; here the shorter side is resized (bicubic), followed by
            a center crop.
        answer: maps normalised images [B, 3, H, W] to the other library's unit-length embeddings, logits or pooled
            vectors.
        class_names: class names of a classifier.
        tokenizer: tokenizer of a dual encoder.
        answer_text: maps ids [B, L] to the other library's unit-length text embeddings.
    """

    config: DualEncoderConfig | ClassifierConfig | TowerConfig
    weights: dict[str, Tensor]
    preprocess: PreprocessConfig
    resizing: str
    answer: Callable[[Float[Tensor, "B 3 H W"]], Float[Tensor, "B K"]]
    class_names: list[str] | None = None
    tokenizer: TokenizerConfig | None = None
    answer_text: Callable[[Int[Tensor, "B L"]], Float[Tensor, "B E"]] | None = None


def rename_weights(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Return the weights under our names.

    Packed "qkv" are split into three, and tokens and tables lose their batch dimension.

    Args:
        state: weights by their names in the other library.
        names: regular expressions and their replacements, applied in order. A weight whose name becomes empty is
            dropped.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for theirs, ours in names.items():
            name = re.sub(theirs, ours, name)
        if ".qkv." in name:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            renamed |= {name.replace(".qkv.", f".{part}."): rows for part, rows in parts}
        elif name.endswith(("class_token", "distillation_token")):
            renamed[name] = tensor.flatten()
        elif name.endswith(("positions", "registers")) and tensor.ndim == 3:
            renamed[name] = tensor[0]
        elif name:
            renamed[name] = tensor
    return renamed


def activation_name(theirs: str | nn.Module, where: str) -> Activation:
    """Return our name of an activation; raises UsageError if it is not supported."""
    if isinstance(theirs, nn.GELU):
        return "gelu_tanh" if theirs.approximate == "tanh" else "gelu"
    name = theirs if isinstance(theirs, str) else type(theirs).__name__
    if name not in _ACTIVATIONS:
        raise UsageError(f"the activation {name} is not supported", where=where)
    return _ACTIVATIONS[name]


def cannot_open(source: str, error: Exception) -> UsageError:
    """Return the error for a model that another library cannot open."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, KeyError):
        reason = f"its config has no {reason}"
    hint = "check the name, and that all files exist or can be downloaded, with the weights as safetensors"
    return UsageError(f"{source} cannot be opened: {reason}", where=source, hint=hint)
