"""What is saved in the tests of the saver, small and of a known content, and how the result is looked at."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmvit.checkpoint import latest_checkpoint, load_model, save_checkpoint, save_model, verify_folder
from mmvit.data.tokenizers import Tokenizer, TokenizerConfig, build_tokenizer
from mmvit.data.transforms import PreprocessConfig
from mmvit.models.build import build_dual_encoder
from mmvit.models.dual_encoder import DualEncoder, DualEncoderConfig
from mmvit.towers.text import TextConfig
from mmvit.towers.vit import ViTConfig

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "checkpoints" / "version1" / "tokenizer.json"
CONFIG = DualEncoderConfig(
    embed_dim=8,
    image=ViTConfig(image_size=8, patch_size=8, width=8, depth=1, num_heads=1),
    text=TextConfig(vocab_size=300, end_of_text=2, context_length=8, width=8, depth=1, num_heads=1),
)


DAMAGED = b"damaged"


def tensors(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {name: {"weight": torch.randn(8, 8, generator=generator)} for name in ("model", "optimizer")}


def save(run: Path, step: int, keep_last: int = 2, keep_every: int | None = None) -> Path:
    return save_checkpoint(run, step, tensors(step), {"step": step}, keep_last, keep_every)


def step_of(run: Path) -> int:
    """Return the step that the run would go on with; every folder with a final name must be whole."""
    folders = run / "checkpoints"
    for folder in folders.glob("step-*"):
        if (folder / "model.safetensors").read_bytes() != DAMAGED:
            verify_folder(folder)
    found = latest_checkpoint(run)
    if found is None:
        return 0
    for name, group in tensors(found.step).items():
        assert torch.equal(found.tensors[name]["weight"], group["weight"])
    assert found.state == {"step": found.step}
    return found.step


@functools.cache
def tiny_model() -> DualEncoder:
    return build_dual_encoder(CONFIG, PreprocessConfig().mean, PreprocessConfig().std)


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    return build_tokenizer(TokenizerConfig("file", str(TOKENIZER)), CONFIG.text.context_length)


def save_tiny_model(run: Path, scale: int) -> None:
    torch.nn.init.constant_(tiny_model().logit_scale, scale)
    save_model(run / "model", tiny_model(), CONFIG, PreprocessConfig(), TokenizerConfig("file", str(TOKENIZER)))


def scale_of(run: Path) -> int:
    """Return what the model in place was saved with, 0 where there is none."""
    if not any(run.glob("model")) and not any(run.glob(".model.new")):
        return 0
    return int(load_model(run / "model").model.logit_scale.item())


class Scene(NamedTuple):
    """A save to disturb: what was before, the save itself, how to see which of the two is there, and a later save."""

    before: Callable[[Path], object]  # in an empty folder
    act: Callable[[Path], object]
    seen: Callable[[Path], int]
    old: int
    new: int
    after: Callable[[Path], object]
    last: int


def _two_damaged(run: Path) -> None:
    save(run, 1)
    (save(run, 2) / "model.safetensors").write_bytes(DAMAGED)


SCENES = {
    "first save": Scene(lambda run: None, lambda run: save(run, 2), step_of, 0, 2, lambda run: save(run, 3), 3),
    "next save, the oldest goes": Scene(
        lambda run: save(run, 1),
        lambda run: save(run, 2, keep_last=1),
        step_of,
        1,
        2,
        lambda run: save(run, 3, keep_last=1),
        3,
    ),
    "save in a damaged one's place": Scene(
        _two_damaged, lambda run: save(run, 2), step_of, 1, 2, lambda run: save(run, 3), 3
    ),
    "save of a step that is there": Scene(
        lambda run: save(run, 2), lambda run: save(run, 2), step_of, 2, 2, lambda run: save(run, 3), 3
    ),
    "first model": Scene(
        lambda run: None, lambda run: save_tiny_model(run, 2), scale_of, 0, 2, lambda run: save_tiny_model(run, 3), 3
    ),
    "model in an older one's place": Scene(
        lambda run: save_tiny_model(run, 1),
        lambda run: save_tiny_model(run, 2),
        scale_of,
        1,
        2,
        lambda run: save_tiny_model(run, 3),
        3,
    ),
}
CRASHING = [name for name, scene in SCENES.items() if scene.old != scene.new]


def set_up(name: str, run: Path) -> Scene:
    """Make the run folder of a scene, copied where it was made before."""
    scene, made = SCENES[name], run.parent / f"before {name}"
    if not made.exists():
        made.mkdir()
        scene.before(made)
    shutil.copytree(made, run)
    return scene
