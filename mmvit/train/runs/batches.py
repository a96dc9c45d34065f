"""The training batches of one rank."""

from accelerate import Accelerator

from mmvit.config import FinetuneConfig, PretrainConfig
from mmvit.data.batches import BatchSplit, TrainBatches
from mmvit.data.source import SampleSource
from mmvit.data.stored import StoredEmbeddings
from mmvit.data.tokenizers import Tokenizer


def build_batches(
    config: PretrainConfig | FinetuneConfig,
    source: SampleSource,
    accelerator: Accelerator,
    tokenizer: Tokenizer | None = None,
    teacher: StoredEmbeddings | None = None,
) -> TrainBatches:
    """Return the batches of this rank; without a tokenizer, images come with classes instead of texts."""
    return TrainBatches(
        source,
        config.data,
        tokenizer,
        image_size=config.model.image.image_size,
        batch_size=config.train.batch_size,
        num_steps=config.train.steps,
        seed=config.seed,
        split=BatchSplit(accelerator.process_index, accelerator.num_processes, config.train.micro_batches),
        stages=config.curriculum,
        patch_size=config.model.image.stride if config.data.patch_budget else None,
        teacher=teacher,
    )
