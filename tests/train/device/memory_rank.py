"""One of two processes that train with compiled blocks, and compare with a model that is not compiled."""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig
from mmvit.train.device.memory import checkpoint_activations, compile_blocks

TOLERANCE = 1e-5
LENGTHS = (8, 5, 11, 6, 9, 7, 10, 8, 12, 4)


def build() -> DualEncoder:
    torch.manual_seed(0)
    image = ViTConfig(image_size=32, patch_size=8, width=32, depth=2, num_heads=2)
    text = TextConfig(vocab_size=60, context_length=16, end_of_text=59, width=32, depth=2, num_heads=2)
    return build_dual_encoder(DualEncoderConfig(embed_dim=16, image=image, text=text))


def loss(model: torch.nn.Module, length: int, rows: slice) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 58, (8, 1, length), generator=generator)
    ids[..., -1] = 59
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=generator, dtype=torch.uint8)
    embeddings = model(images[rows], ids[rows])
    return (embeddings.image * embeddings.text[:, 0]).sum(dim=1).mean()


def main() -> None:
    mode, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    plain, model = build(), build()
    checkpoint_activations(model, mode)
    compile_blocks(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    wrapped = DistributedDataParallel(model, static_graph=False, find_unused_parameters=True)
    for length in LENGTHS:
        plain.zero_grad()
        loss(plain, length, slice(None)).backward()
        model.zero_grad()
        loss(wrapped, length, slice(4 * rank, 4 * rank + 4)).backward()
        for (name, one), two in zip(plain.named_parameters(), model.parameters(), strict=True):
            if one.grad is not None:
                assert two.grad is not None, name
                worst = (one.grad - two.grad).abs().max().item()
                assert worst < TOLERANCE, (length, name, worst)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 4, graphs  # one a tower, one more for texts of any length; blocks of one shape share it
    dist.destroy_process_group()


main()
