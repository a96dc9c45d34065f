"""100 wrong inputs as newcomers from open_clip, timm, ultralytics and sentence-transformers type them.

Run `python tests/typos.py` for all of them, each in a process of its own: it prints exit code, seconds and whether the
first hint is the right one. `tests/test_typos.py` runs some of them in the default suite.
"""

import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

STORED = Path(__file__).parent / "fixtures" / "checkpoints" / "version2"
PROGRAMS = {"mmvit": "mmvit", "mmvit-data": "data_tools"}


class Typo(NamedTuple):
    """A command, a part of the first hint that helps its user, and the exit code."""

    command: str
    hint: str
    code: int = 2


TYPOS = (
    # Verbs of other libraries, and misspelt ones.
    Typo("mmvit train quickstart", "mmvit pretrain"),
    Typo("mmvit pretrian quickstart", "mmvit pretrain"),
    Typo("mmvit fine-tune finetune/swin_t", "mmvit finetune"),
    Typo("mmvit eval runs/x --data data", "mmvit zero-shot"),
    Typo("mmvit val model=runs/x data=data", "mmvit zero-shot"),
    Typo("mmvit predict model=runs/x source=photo.jpg", "mmvit classify"),
    Typo("mmvit infer runs/x photo.jpg", "mmvit classify"),
    Typo("mmvit zeroshot runs/x photo.jpg", "mmvit zero-shot"),
    Typo("mmvit zero_shot runs/x photo.jpg --classes a,b", "mmvit zero-shot"),
    Typo("mmvit encode runs/x data", "mmvit embed"),
    Typo("mmvit retrieve emb --text dog", "mmvit search"),
    Typo("mmvit convert hf:openai/clip-vit-base-patch32 m", "mmvit import"),
    Typo("mmvit download open_clip:ViT-B-32/openai", "mmvit import"),
    Typo("mmvit show runs/x", "mmvit inspect"),
    Typo("mmvit list", "mmvit configs"),
    Typo("mmvit models", "mmvit configs"),
    Typo("mmvit resume runs/x", "mmvit pretrain"),
    Typo("mmvit tensorboard runs/x", "mmvit plot"),
    Typo("mmvit monitor runs/x", "mmvit status"),
    Typo("mmvit make images out", "mmvit-data make"),
    Typo("mmvit tokenizer data --out tok.json", "mmvit-data tokenizer"),
    Typo("mmvit --train-data data --model ViT-B-32", "mmvit pretrain"),
    # Configs.
    Typo("mmvit pretrain clip_vit_b32", "pretrain/clip_vit_b32"),
    Typo("mmvit pretrain ViT-B-32", "pretrain/clip_vit_b32"),
    Typo("mmvit pretrain pretrain/clip-vit-b32", "pretrain/clip_vit_b32"),
    Typo("mmvit pretrain finetune/swin_t data.train=data", "mmvit finetune finetune/swin_t"),
    Typo("mmvit finetune pretrain/clip_vit_b32 data.train=data", "mmvit pretrain pretrain/clip_vit_b32"),
    Typo("mmvit finetune swin", "finetune/swin_t"),
    Typo("mmvit pretrain my.yml", "my.yaml"),
    Typo("mmvit pretrain runs/y/config.yaml", "runs/x"),
    Typo("mmvit pretrain data", "mmvit configs"),
    Typo("mmvit pretrain", "mmvit configs"),
    Typo("mmvit pretrain --config my.yaml", "mmvit pretrain my.yaml"),
    Typo("mmvit configs pretrain/clip_vit_b61", "pretrain/clip_vit_b16"),
    # Keys.
    Typo("mmvit pretrain my.yaml data.tarin=data", "data.train"),
    Typo("mmvit pretrain my.yaml train.bath_size=64", "train.batch_size"),
    Typo("mmvit pretrain my.yaml bath_size=64", "train.batch_size"),
    Typo("mmvit pretrain my.yaml batch_size=64", "train.batch_size"),
    Typo("mmvit pretrain my.yaml lr=1e-3", "optim.lr"),
    Typo("mmvit pretrain my.yaml optimizer.lr=1e-3", "optim.lr"),
    Typo("mmvit pretrain my.yaml epochs=10", "train.steps"),
    Typo("mmvit pretrain my.yaml --batch-size 64", "train.batch_size=64"),
    Typo("mmvit pretrain my.yaml --lr=1e-3", "optim.lr=1e-3"),
    Typo("mmvit pretrain my.yaml --train-data data", "data.train=data"),
    Typo("mmvit pretrain my.yaml --workers 4", "data.num_workers=4"),
    Typo("mmvit pretrain my.yaml --output_dir runs/z", "out=runs/z"),
    Typo("mmvit pretrain my.yaml --pretrained runs/x", "train.init=runs/x"),
    Typo("mmvit pretrain my.yaml --resume runs/x", "same command again"),
    Typo("mmvit finetune finetune/digits_vit imgsz=224", "model.image.image_size"),
    Typo("mmvit pretrain my.yaml train.batch_size 64", "train.batch_size=64"),
    Typo("mmvit pretrain my.yaml train.batch_size = 64", "train.batch_size=64"),
    Typo("mmvit pretrain my.yaml train.batch_size:64", "train.batch_size=64"),
    # Values.
    Typo("mmvit pretrain my.yaml train.batch_size=large", "train.batch_size=256"),
    Typo("mmvit pretrain my.yaml optim.name=adam", "adamw"),
    Typo("mmvit pretrain my.yaml train.precision=fp16", "bf16"),
    Typo("mmvit pretrain my.yaml train.precision=amp_bf16", "bf16"),
    Typo("mmvit pretrain my.yaml loss.kind=siglip", "sigmoid"),
    Typo("mmvit pretrain my.yaml model.image.kind=resnet50", "resnet"),
    Typo("mmvit finetune finetune/digits_vit model.image.kind=swin_tiny data.train=data", "swin_t"),
    Typo("mmvit pretrain my.yaml tokenizer.kind=bpe", "clip"),
    Typo("mmvit pretrain my.yaml optim.lr=-1", "optim.lr"),
    Typo("mmvit pretrain pretrain/clip_vit_b32", "data.train="),
    Typo("mmvit pretrain my.yaml data.train=dta", "data", 3),
    # Models, images and their options.
    Typo("mmvit zero-shot runs/y photo.jpg --classes a,b", "runs/x"),
    Typo("mmvit zero-shot runs/x/modle photo.jpg --classes a,b", "runs/x/model"),
    Typo("mmvit zero-shot ViT-B-32 photo.jpg --classes a,b", "mmvit import open_clip:ViT-B-32"),
    Typo("mmvit zero-shot openai/clip-vit-base-patch32 photo.jpg --classes a,b", "mmvit import hf:openai"),
    Typo("mmvit zero-shot runs/half photo.jpg --classes a,b", "mmvit pretrain runs/half/config.yaml"),
    Typo("mmvit zero-shot runs/x phto.jpg --classes a,b", "photo.jpg", 3),
    Typo("mmvit zero-shot runs/x photo.jpg", "--classes"),
    Typo("mmvit zero-shot runs/x photo.jpg --labels a,b", "--classes"),
    Typo("mmvit zero-shot runs/x photo.jpg --class a,b", "--classes"),
    Typo("mmvit zero-shot runs/x photo.jpg --classes a,b --prompts korean", "--templates"),
    Typo("mmvit zero-shot runs/x photo.jpg --classes a,b --templates imagnet", "imagenet"),
    Typo("mmvit zero-shot runs/x photo.jpg --classes a,b --topk 3", "--top"),
    Typo("mmvit classify runs/x photo.jpg", "mmvit zero-shot"),
    Typo("mmvit embed runs/x data", "--out"),
    Typo("mmvit embed runs/x data -o emb2", "--out"),
    Typo("mmvit embed runs/x data --out emb2 --modality images", "image"),
    Typo("mmvit search em --text dog", "emb"),
    Typo("mmvit search emb dog", "--text"),
    Typo("mmvit search emb --text dog --top 3", "-k"),
    Typo("mmvit search runs/x --text dog", "mmvit embed"),
    Typo("mmvit import openai/clip-vit-base-patch32 m", "hf:openai/clip-vit-base-patch32"),
    Typo("mmvit inspect runs/x --view atention", "rollout"),
    Typo("mmvit plot runs/y", "runs/x"),
    # Data.
    Typo("mmvit-data create images out", "mmvit-data make"),
    Typo("mmvit-data verify data", "mmvit-data check"),
    Typo("mmvit-data inspect data", "mmvit-data peek"),
    Typo("mmvit-data split data --out d2", "mmvit-data reshard"),
    Typo("mmvit-data pretrain quickstart", "mmvit pretrain"),
    Typo("mmvit-data dedupe data", "mmvit-data dedup"),
    Typo("mmvit-data make images", "OUT"),
    Typo("mmvit-data make imges out", "images", 3),
    Typo("mmvit-data make captions.csv out --caption-col text", "--caption-column"),
    Typo("mmvit-data make captions.csv out --kind cvs", "csv"),
    Typo("mmvit-data check dta/*.tar", "data", 3),
    Typo("mmvit-data filter data --out d2 --where 'widht > 256'", "width"),
    Typo("mmvit-data reshard data --out d2 --size 100", "--shard-size"),
    Typo("mmvit-data tokenizer data --out t.json --vocab 1000", "--vocab-size"),
)


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    seconds: float
    errors: str

    def fault(self, typo: Typo) -> str:
        """Return what is wrong with it, "" if its user is helped."""
        if self.code != typo.code:
            return f"exit code {self.code} instead of {typo.code}"
        hint = first_hint(self.errors)
        return "" if typo.hint in hint else f"the first hint is {hint!r}, without {typo.hint!r}"


def first_hint(errors: str) -> str:
    """Return the first hint of a message, "" if it has none."""
    hints = [line.partition("hint:")[2].strip() for line in errors.splitlines() if line.strip().startswith("hint:")]
    return hints[0] if hints else ""


def make_place(folder: Path) -> None:
    """Write what a newcomer has: images, a table, shards, a config, a finished run and one that was stopped."""
    shutil.copytree(STORED / "data", folder / "data")
    shutil.copytree(STORED / "run", folder / "runs" / "x")
    shutil.copytree(STORED / "run", folder / "runs" / "half")
    shutil.copytree(STORED / "model", folder / "runs" / "x" / "model")
    shutil.copytree(STORED / "embeddings", folder / "emb")
    shutil.copy(STORED / "tokenizer.json", folder)
    shutil.copy(STORED / "picture.jpg", folder / "photo.jpg")
    (folder / "images").mkdir()
    shutil.copy(STORED / "picture.jpg", folder / "images")
    (folder / "captions.csv").write_text("image,text\nimages/picture.jpg,a dog\n")
    text = (STORED / "run" / "config.yaml").read_text()
    (folder / "my.yaml").write_text(text.replace("out: run\n", "out: runs/mine\n", 1))


def run_typo(typo: Typo, folder: Path) -> Outcome:
    """Run a command in a process of its own."""
    program, *arguments = shlex.split(typo.command)
    command = [sys.executable, "-m", PROGRAMS[program], *arguments]
    root = str(Path(__file__).resolve().parents[1])
    start = time.perf_counter()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1"},
    )
    return Outcome(done.returncode, time.perf_counter() - start, done.stderr)


def main() -> int:
    """Run all typos, or those whose command holds the words of the command line; print a table."""
    chosen = [typo for typo in TYPOS if all(word in typo.command for word in sys.argv[1:])]
    times, wrong = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        make_place(Path(temporary))
        for typo in chosen:
            outcome = run_typo(typo, Path(temporary))
            fault = outcome.fault(typo)
            times.append(outcome.seconds)
            wrong += bool(fault)
            print(f"{outcome.code:>3} {outcome.seconds:5.2f} s  {typo.command}{f'   WRONG: {fault}' if fault else ''}")
    print(f"{len(chosen)} typos, {len(chosen) - wrong} right; median {statistics.median(times):.2f} s, ", end="")
    print(f"longest {max(times):.2f} s")
    return int(wrong > len(chosen) / 20)


if __name__ == "__main__":
    sys.exit(main())
