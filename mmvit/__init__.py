"""mmvit: train and use CLIP-style image-text models on WebDataset shards.

`mmvit.load(folder)` returns an encoder, `mmvit.zero_shot_classifier(encoder, names, templates)` an image classifier.
Importing this package does not import torch; the first use of a name does.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["load", "zero_shot_classifier"]

if TYPE_CHECKING:
    from mmvit.eval.encoder import load
    from mmvit.eval.zero_shot import zero_shot_classifier


def __getattr__(name: str) -> Any:
    if name == "load":
        from mmvit.eval.encoder import load

        return load
    if name == "zero_shot_classifier":
        from mmvit.eval.zero_shot import zero_shot_classifier

        return zero_shot_classifier
    raise AttributeError(f"module 'mmvit' has no attribute {name!r}")
