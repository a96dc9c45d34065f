"""The evaluator of held-out pairs in an image-text run."""

from collections.abc import Callable
from typing import Any

from mmvit.config import PretrainConfig
from mmvit.data.shards import IndexedShards
from mmvit.data.source import some_samples
from mmvit.data.tokenizers import Tokenizer
from mmvit.eval.classify import check_images
from mmvit.eval.encoder import Encoder
from mmvit.eval.pairs import check_pairs, evaluate_pairs


class PairEvaluator:
    """Measures loss and recall of held-out pairs; `shards` is None on all ranks but the main one."""

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer, shards: IndexedShards | None):
        self.every = config.validation.every
        self.num_samples = config.validation.samples
        self.caption = config.data.captions[0]
        self.image_size = config.model.image.image_size
        self.tokenizer = tokenizer
        self.shards = shards

    def check(self) -> None:
        """Read an image, and a caption."""
        assert self.shards is not None
        check_images(self.shards)
        check_pairs(self.shards, self.caption)

    def measure(self, model: Any, last: bool, before_each_batch: Callable[[], None]) -> dict[str, float]:
        """Return the loss, and R@1 and R@5 in both directions, of the same pairs each time."""
        assert self.shards is not None
        encoder = Encoder(model, self.tokenizer, image_size=self.image_size, fingerprint="")
        samples = some_samples(self.shards, self.num_samples)
        found = evaluate_pairs(encoder, self.shards, samples, self.caption, before_each_batch)
        figures = {"val_loss": found.loss}
        figures |= {f"val_image_to_text_r{k}": value for k, value in zip((1, 5), found.image_to_text, strict=True)}
        figures |= {f"val_text_to_image_r{k}": value for k, value in zip((1, 5), found.text_to_image, strict=True)}
        return figures | ({"val_bad_samples": found.num_bad} if found.num_bad else {})
