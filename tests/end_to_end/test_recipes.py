"""What a user can ask of a run does what it says, and goes on bit for bit where it was stopped."""

import functools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import mmvit
from data_tools.core.errors import CheckpointError, MmvitError, UsageError
from data_tools.make.tokenizer import train_tokenizer
from mmvit.checkpoint import load_model, read_checkpoint
from mmvit.config import PretrainConfig, load_config
from mmvit.data.tokenizers import TokenizerConfig, build_tokenizer
from mmvit.eval.classify import Accuracy
from mmvit.eval.encoder import Encoder
from mmvit.layers.positions import resample_positions
from mmvit.models.dual_encoder import DualEncoder, Embeddings
from mmvit.retrieval.sources import open_source
from mmvit.retrieval.store import embed_source
from mmvit.train import meters
from mmvit.train.device.flops import FlopCounter
from mmvit.train.loop import open_run, pretrain
from mmvit.train.record.run_log import read_log
from mmvit.train.run import Run, open_accelerator
from mmvit.train.runs import pretraining
from mmvit.train.safety.watch import Watch

RunCli = Callable[..., tuple[int, str, str]]

STEPS = 6
BF16_TOLERANCE = 0.004  # relative, of a loss in bf16: its unit in the last place
SETTINGS = (f"train.steps={STEPS}", "train.batch_size=8", "train.log_every=1", "data.num_workers=0")
NO_CHANGE = tuple(f"data.augment.{name}=null" for name in ("zoom", "rotate", "shift", "brightness", "hue"))
SQUARE = "seed=2"  # with it no image of the first steps has another shape, of which an evaluation cuts the middle
STILL = ("optim.lr=1e-12", "optim.muon_lr=1e-12")  # the least that is allowed: no update can be seen
ONE_CAPTION = "data.captions=[{source: names.en}]"
STAGES = "curriculum=[{until: 0.7, image_size: 16, text_tokens: 7, patch_dropout: 0.5}, {until: 1, patch_dropout: 0.2}]"
ALL_LOSSES = (
    *("loss.kind=sigmoid", "model.initial_logit_bias=-5", "loss.joint_captions=true"),
    *("model.caption_depth=1", "loss.captioning=1", "model.token_head=true", "loss.token_classification=0.5"),
)

# {model}, {other}: model folders. {rows}, {other_rows}: folders of their embeddings of the training data.
RECIPES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "average": (
        *("optim.name=adamw", "optim.lr=0.01", "optim.decay_share=0"),
        *("optim.ema_decay=0.5", "train.save_every=1", "train.keep_every=1"),
    ),
    "stored images": (
        *("optim.name=sgd", "optim.lr=0.01", ONE_CAPTION, SQUARE),
        *("train.init={model}", "train.freeze=[image_*]", "data.image_embeddings={rows}"),
    ),
    "adapters": ("optim.name=lamb", "train.init={model}", "lora.rank=4", "lora.targets=[q, v, up]"),
    "all losses": ("optim.name=stable_adamw", *ALL_LOSSES),
    "curriculum": (STAGES, "train.micro_batches=2"),
    "patches": ("model.image.stem_channels=[]", "data.patch_budget=12", "optim.layer_decay=0.7"),
    "teacher": ("loss.distillation=5", "loss.teacher={other}", "train.checkpointing=selective", "optim.ema_decay=0.9"),
    "teacher's rows": ("loss.distillation=5", "loss.teacher={other_rows}", "train.micro_batches=2"),
    "bf16_params": ("train.precision=bf16_params", "train.checkpointing=full"),
    "bf16": ("train.precision=auto", "train.micro_batches=2"),
}


NONE = torch.zeros(0, dtype=torch.long)
SAMPLE_FLOPS = FlopCounter.sample_flops
TEACHERS = ("teacher", "teacher's rows")


def units_of(recipe: str) -> str:
    """Whether a recipe is for a machine with bf16 units; there Muon computes in bf16 as well."""
    return "1" if recipe.startswith("bf16") else "0"


class Recipes:
    """Makes configs, and runs each recipe once."""

    def __init__(self, tiny_config: Path, folder: Path):
        self.tiny_config = tiny_config
        self.folder = folder
        self.names: dict[str, str] = {}
        self.count = 0
        self.finished = functools.cache(self._finished)

    def config(self, *overrides: str) -> PretrainConfig:
        """Make the config of a new run; later overrides replace earlier ones."""
        self.count += 1
        given = {each.partition("=")[0]: each for each in (*SETTINGS, *overrides)}
        filled = [re.sub(r"\{(\w+)\}", lambda found: self.names[found[1]], each) for each in given.values()]
        return load_config(PretrainConfig, self.tiny_config, [f"out={self.folder / str(self.count)}", *filled])

    def of(self, name: str, *overrides: str) -> PretrainConfig:
        """Make the config of a new run of a recipe."""
        return self.config(*RECIPES[name], *overrides)

    def run(self, name: str, *overrides: str) -> Path:
        """Run a recipe with some settings changed; returns the folder of the run."""
        return pretrain(self.of(name, *overrides)).parent

    def _finished(self, name: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FlopCounter, "sample_flops", SAMPLE_FLOPS)
            patch.setenv("MMVIT_BF16_UNITS", units_of(name))
            return self.run(name)


@pytest.fixture(scope="module", autouse=True)
def same_arithmetic() -> Iterator[None]:
    """A machine without bf16 units: what is exact is tested in fp32, and Muon computes in it too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMVIT_BF16_UNITS", "0")
        yield


@pytest.fixture(scope="module")
def recipes(tiny_config: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    """Recipes with two models to start from or to learn from, and their embeddings of the training data."""
    recipes = Recipes(tiny_config, tmp_path_factory.mktemp("recipes"))
    model = recipes.finished("plain") / "model"
    other = pretrain(recipes.config("model.embed_dim=16", "model.initial_logit_scale=50", "seed=5"))
    recipes.names |= {"model": str(model), "other": str(other)}
    for name in ("model", "other"):
        rows = recipes.folder / f"rows-{name}"
        folder = Path(recipes.names[name])
        embed_source(mmvit.load(folder), folder, open_source(f"{tiny_data}/train-*.tar"), rows)
        recipes.names["rows" if name == "model" else "other_rows"] = str(rows)
    return recipes


@pytest.fixture(autouse=True)
def no_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count no operations, which takes most of the time of so small a run; those of `Recipes.finished` do."""
    monkeypatch.setattr(meters, "peak_flops", lambda device, dtype: None)
    monkeypatch.setattr(FlopCounter, "sample_flops", lambda *batch: 1.0)


def opened(config: PretrainConfig) -> Run:
    return open_run(config, open_accelerator(config), Watch(config.train.timeout_s))


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def logged(run: Path, name: str = "loss", only: bool = False) -> Tensor:
    """Return a figure of every step, or of those `only` that have it."""
    return torch.tensor([line[name] for line in read_log(run / "log.jsonl") if not only or name in line])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in TEACHERS)) for name in RECIPES if name != "plain"],
)
def test_stopped_run_goes_on_bit_for_bit(
    recipes: Recipes,
    name: str,
    stop_after: Callable[[PretrainConfig, int], int],
    monkeypatch: pytest.MonkeyPatch,
):
    """Every optimiser is among the recipes; the signal comes in the middle of a stage of the curriculum."""
    monkeypatch.setenv("MMVIT_BF16_UNITS", units_of(name))
    undisturbed, config = recipes.finished(name), recipes.of(name)
    assert 0 < stop_after(config, 1) < STEPS - 2
    run, last = pretrain(config).parent, Path(f"checkpoints/step-{STEPS:08d}")
    files = [last / path.name for path in (run / last).glob("*.safetensors")]
    assert {file.stem for file in files} >= {"model", "optimizer"}
    for file in (Path("model/model.safetensors"), *files):
        assert (run / file).read_bytes() == (undisturbed / file).read_bytes(), file
    assert torch.equal(logged(run), logged(undisturbed))


def embeddings(model: DualEncoder, config: PretrainConfig) -> Embeddings:
    """Look at the first batch of a run as it stands in the data, in the mode of evaluation."""
    batch = opened(config).task.batches[0]
    with torch.no_grad():
        return model.eval()(batch.images, batch.ids)


def figure(encoder: Encoder) -> float:
    """Tell one model from another."""
    picture = Image.new("RGB", (40, 40), (200, 30, 90))
    return (encoder.encode_image([picture]) @ encoder.encode_text(["red heart"]).T).item()


def test_average_is_evaluated_and_exported(recipes: Recipes, tiny_data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        pretraining,
        "evaluate_zero_shot",
        lambda encoder, *task, **options: Accuracy(figure(encoder), 0.0, NONE, NONE, NONE, num_bad=0),
    )
    data = f"zero_shot={{data: [{tiny_data}/val-*.tar], class_names: {tiny_data}/names.en.txt, every: 3}}"
    config = recipes.of("average", data)
    average = {name: value.double() for name, value in opened(config).model.state_dict().items()}
    run = pretrain(config).parent
    for step in range(STEPS):
        last = read_checkpoint(run / "checkpoints" / f"step-{step + 1:08d}").tensors["model"]
        decay = min(0.5, (1 + step) / (10 + step))
        average = {name: decay * value + (1 - decay) * last[name].double() for name, value in average.items()}
    exported = weights(run)
    assert exported.keys() == average.keys()
    assert max(float((exported[name] - value).abs().max()) for name, value in average.items()) < 1e-6
    assert max(float((exported[name] - value).abs().max()) for name, value in last.items()) > 1e-3
    assert (exported["text_projection.weight"] == weights(recipes.finished("average"))["text_projection.weight"]).all()

    evaluated = logged(run, "zero_shot_acc1", only=True)
    assert len(evaluated) == 2
    encoder = mmvit.load(run / "model")
    assert evaluated[1] == pytest.approx(figure(encoder), abs=1e-6)
    encoder.model.load_state_dict(last)
    assert abs(evaluated[1] - figure(encoder)) > 1e-3


def test_text_tower_learns_from_stored_images(recipes: Recipes):
    run, model = recipes.finished("stored images"), load_model(recipes.names["model"]).model.state_dict()
    exported = weights(run)
    changed = {name for name, value in exported.items() if not torch.equal(value, model[name])}
    assert not {name for name in changed if name.startswith("image_")}
    assert {name for name in exported if name.startswith("text_tower.blocks")} <= changed
    assert {"text_projection.weight", "logit_scale"} <= changed


def test_stored_images_train_as_the_pictures_do(recipes: Recipes):
    """The images as `mmvit embed` sees them: nothing random.

    Captions have no choice: it comes from the random state that the changes of the image come from.
    """
    stored = logged(recipes.finished("stored images"))
    pictures = logged(recipes.run("stored images", "data.image_embeddings=''", "data.decode=exact", *NO_CHANGE))
    assert (stored - pictures).abs().max() < 1e-4
    assert (stored[1:] - stored[:-1]).abs().min() > 1e-3


def test_adapters_are_merged_into_weights_that_stand_still(recipes: Recipes):
    run, model = recipes.finished("adapters"), load_model(recipes.names["model"]).model.state_dict()
    last = read_checkpoint(run / "checkpoints" / f"step-{STEPS:08d}").tensors["model"]
    towers = [name for name in last if "_tower." in name]
    for name in towers:
        if ".lora_B." in name:
            assert last[name].count_nonzero(), name
        elif ".lora_A." not in name:
            assert torch.equal(last[name], model[name.replace(".base_layer.", ".")]), name
    assert sum(".lora_B." in name for name in towers) == 2 * 3

    config = load_config(PretrainConfig, run / "config.yaml")
    adapted = opened(config)
    assert adapted.resume() == STEPS
    merged = mmvit.load(run / "model").model
    for one, two in zip(embeddings(merged, config)[:2], embeddings(adapted.model, config)[:2], strict=True):
        assert (one - two).abs().max() < 1e-6
    changed = {name for name, value in weights(run).items() if not torch.equal(value, model[name])}
    assert {name for name in changed if "_tower." in name} == {
        f"{tower}_tower.blocks.0.{name}.weight"
        for tower in ("image", "text")
        for name in ("attention.q", "attention.v", "feed_forward.up")
    }


@pytest.mark.slow
def test_student_comes_nearer_to_its_teacher(recipes: Recipes, spoiled_data: Callable[..., Path], tmp_path: Path):
    """On sixteen samples that it can learn by heart."""
    few = spoiled_data(tmp_path, broken=(), max_samples=16) / "train-00000.tar"
    seen = (f"data.train=[{few}]", "train.steps=24", "optim.warmup_share=0", ONE_CAPTION, *NO_CHANGE)
    ends = []
    for weight in (20.0, 1e-6):
        found = logged(recipes.run("teacher", f"loss.distillation={weight}", *seen), "loss_distillation") / weight
        ends.append(found)
    assert ends[0][-4:].mean() < 0.5 * ends[0][:4].mean()
    assert ends[0][-4:].mean() < 0.5 * ends[1][-4:].mean()


def test_rows_on_disk_teach_as_their_model_does(recipes: Recipes):
    """The rows are of the whole image and of the caption in `txt`."""
    seen = ("train.micro_batches=1", "data.captions=[{source: txt}]", "data.decode=exact", *NO_CHANGE, *STILL, SQUARE)
    found = [logged(recipes.run(name, "train.steps=3", *seen), "loss_distillation") for name in TEACHERS]
    assert torch.allclose(found[0], found[1], rtol=3e-3)  # rows of float16, times a logit scale of 50


def test_further_losses_are_logged_and_fall(recipes: Recipes):
    run = recipes.run("all losses", "train.steps=16", "optim.lr=5e-3")
    names = ("loss_contrastive", "loss_captioning", "loss_token_classification")
    losses = torch.stack([logged(run, name) for name in names])
    assert torch.allclose(losses.sum(dim=0), logged(run), rtol=1e-5)
    assert (losses[:, -1] < 0.97 * losses[:, 0]).all()
    model = mmvit.load(run / "model").model
    assert abs(model.logit_bias.item() + 5) > 1e-3
    fresh = opened(load_config(PretrainConfig, run / "config.yaml")).model.state_dict()
    for name in ("caption_decoder.blocks.0.context_attention.k.weight", "token_head.weight"):
        assert not torch.equal(model.state_dict()[name], fresh[name])


@pytest.mark.parametrize("joint", [True, False])
def test_captions_of_an_image_stand_in_one_softmax_or_in_one_each(recipes: Recipes, joint: bool):
    settings = (f"loss.joint_captions={joint}", "train.same_caption_positives=false", "train.steps=1")
    config = recipes.config(*settings)
    rows = embeddings(opened(config).model, config)
    groups = [rows.text.flatten(0, 1)] if joint else list(rows.text.unbind(dim=1))
    losses = []
    for text in groups:
        logits = rows.logit_scale * rows.image @ text.T
        own = torch.arange(len(text)) // (len(text) // len(rows.image))
        of_images = logits.log_softmax(dim=1)[own, torch.arange(len(text))].mean()
        of_texts = logits.log_softmax(dim=0)[own, torch.arange(len(text))].mean()
        losses.append(-(of_images + of_texts) / 2)
    (found,) = logged(pretrain(config).parent)
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["curriculum", "patches", "all losses", "teacher's rows"])
def test_parts_of_a_batch_train_as_the_whole(recipes: Recipes, name: str):
    others = 2 if "train.micro_batches=2" not in RECIPES[name] else 1
    found = logged(recipes.run(name, f"train.micro_batches={others}"))
    assert torch.allclose(found, logged(recipes.finished(name)), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("bf16_units")
def test_parts_of_a_batch_train_almost_as_the_whole_in_bf16(recipes: Recipes):
    """Sums of other parts are rounded to other 8 bits, in each activation and in each iteration of Muon."""
    found, exact = logged(recipes.run("bf16", "train.micro_batches=1")), logged(recipes.finished("plain"))
    parts = logged(recipes.finished("bf16"))
    print("largest relative difference:", ((found - parts).abs() / exact).max())
    assert torch.allclose(found, parts, rtol=BF16_TOLERANCE)
    assert not torch.equal(parts, exact)
    assert torch.allclose(parts, exact, rtol=5 * BF16_TOLERANCE)


def test_curriculum_changes_what_a_step_sees(recipes: Recipes):
    run = opened(recipes.of("curriculum"))
    early, late = run.task.batches[0], run.task.batches[2 * (STEPS - 1)]
    assert early.images.shape == (4, 3, 16, 16)
    assert late.images.shape == (4, 3, 32, 32)
    assert early.ids.shape[2] <= 7
    assert run.task.part(0, early).inputs[2].shape == (4, 2)
    assert run.task.part(STEPS - 1, late).inputs[2].shape == (4, 13)
    exported = weights(recipes.finished("curriculum"))
    assert exported["image_tower.positions"].shape == (16, 32)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_computing_activations_again_changes_no_byte(recipes: Recipes, mode: str):
    run = recipes.run("plain", f"train.checkpointing={mode}")
    name = "model/model.safetensors"
    assert (run / name).read_bytes() == (recipes.finished("plain") / name).read_bytes()


def test_model_goes_on_at_another_image_size(recipes: Recipes):
    run = recipes.run("plain", "train.init={model}", "model.image.image_size=48", "train.steps=1", *STILL)
    exported, model = weights(run), load_model(recipes.names["model"]).model.state_dict()
    table = "image_tower.positions"
    assert torch.equal(exported.pop(table), resample_positions(model.pop(table), (4, 4), (6, 6)))
    assert all(torch.allclose(value, model[name], rtol=0, atol=1e-10) for name, value in exported.items())


def test_run_past_its_start_needs_the_model_no_more(recipes: Recipes, tmp_path: Path):
    start = Path(shutil.copytree(recipes.names["model"], tmp_path / "start"))
    config = recipes.config(f"train.init={start}", "train.steps=2", "train.save_every=1", "train.keep_last=5")
    whole = (pretrain(config) / "model.safetensors").read_bytes()
    shutil.rmtree(start)
    shutil.rmtree(Path(config.out) / "checkpoints" / "step-00000002")
    assert (pretrain(config) / "model.safetensors").read_bytes() == whole
    config.out = str(tmp_path / "new")
    with pytest.raises(CheckpointError, match="not a model folder"):
        pretrain(config)


def test_a_part_of_a_model_is_taken(recipes: Recipes):
    fresh, model = (
        opened(recipes.config()).model.state_dict(),
        load_model(recipes.names["model"]).model.state_dict(),
    )
    taken = opened(recipes.config("train.init={model}", "train.init_only=[image_*]")).model.state_dict()
    assert all(torch.equal(taken[name], (model if name.startswith("image_") else fresh)[name]) for name in taken)


def test_frozen_logit_scale_stands_still_whatever_its_limit(recipes: Recipes):
    run = recipes.run("plain", "train.freeze=[logit_scale]", "loss.max_logit_scale=5", "train.steps=1")
    assert weights(run)["logit_scale"].exp().item() == pytest.approx(1 / 0.07)


@pytest.mark.usefixtures("bf16_units")
def test_bf16_parameters_have_float32_masters(recipes: Recipes):
    run = recipes.finished("bf16_params")
    tensors = read_checkpoint(run / "checkpoints" / f"step-{STEPS:08d}").tensors
    assert {value.dtype for group in tensors.values() for value in group.values()} == {torch.float32}
    between = [float((value - value.bfloat16()).abs().max()) for value in weights(run).values() if value.ndim == 2]
    assert min(between) > 0
    exact = logged(recipes.finished("plain"))
    assert 0 < (logged(run) - exact).abs().max() < 0.05 * exact.max()


LOCKED = ("data.image_embeddings={rows}", "train.init={model}", "train.freeze=[image_*]")
REFUSED: dict[str, tuple[int, tuple[str, ...], str]] = {
    "captions without decoder": (2, ("loss.captioning=1",), "model.caption_depth"),
    "decoder without captions": (2, ("model.caption_depth=1",), "loss.captioning"),
    "tokens without head": (2, ("loss.token_classification=1",), "model.token_head"),
    "decoder over a tower that sees all": (
        *(2, ("loss.captioning=1", "model.caption_depth=1", "model.text.causal=false"), "needs a causal text tower"),
    ),
    "teacher without weight": (2, ("loss.teacher={other}",), "loss.distillation"),
    "weight without teacher": (2, ("loss.distillation=1",), "loss.teacher"),
    "teacher that is none": (2, ("loss.distillation=1", "loss.teacher=nowhere"), "nowhere"),
    "teacher of whole images": (
        *(2, (*RECIPES["patches"], "loss.distillation=1", "loss.teacher={other}"), "mmvit embed"),
    ),
    "teacher of images that are not read": (
        *(2, (*LOCKED, "loss.distillation=1", "loss.teacher={other}"), "mmvit embed"),
    ),
    "sigmoid without bias": (2, ("loss.kind=sigmoid",), "model.initial_logit_bias"),
    "batch beyond the data": (2, ("train.batch_size=301",), "larger than the data set of 300"),
    "parts that do not divide": (2, ("train.micro_batches=3",), "is not divisible"),
    "sizes of stored images": (2, (*LOCKED, STAGES), "exclude each other"),
    "captions of stored images": (
        *(2, (*LOCKED, "model.caption_depth=1", "loss.captioning=1"), "data.image_embeddings"),
    ),
    "tower to train on stored images": (2, LOCKED[:2], "image_tower."),
    "no model to stored images": (2, LOCKED[::2], "train.init"),
    "stored images of another model": (
        4,
        ("data.image_embeddings={other_rows}", *LOCKED[1:]),
        "not computed by the image tower",
    ),
    "stored images, tower not taken": (4, (*LOCKED, "train.init_only=[text_*]"), "not computed by the image tower"),
    "stored images at another size": (4, (*LOCKED, "model.image.image_size=48"), "not computed by the image tower"),
    "stored images of other pixels": (2, (*LOCKED, "preprocess.mean=[0, 0, 0]"), "preprocess.mean="),
    "model of another width": (4, ("train.init={other}",), "weights do not fit the model"),
    "part of no model": (2, ("train.init_only=[image_*]",), "train.init"),
    "part that no model has": (2, ("train.init={model}", "train.init_only=[imgae_*]"), "image_"),
    "nothing to freeze": (2, ("train.freeze=[imgae_tower.*]",), "similar names: image_tower.*"),
    "all frozen": (2, ("train.freeze=['*']",), "nothing is left to train"),
    "all frozen but the scale": (
        *(2, ("train.freeze=['*_*.*']", "loss.learn_logit_scale=false"), "nothing is left to train"),
    ),
    "patches of a stem": (2, ("data.patch_budget=12",), "stem"),
    "stem of another patch size": (2, ("model.image.patch_size=16",), "patch_size is 16"),
    "unknown map to adapt": (2, ("lora.rank=2", "lora.targets=[query]"), "lora.targets"),
    "unknown tracker": (2, ("train.trackers=[tensorbaord]",), "tensorboard"),
    "unknown optimiser": (2, ("optim.name=adam",), "adamw"),
    "bf16 without units": (2, ("train.precision=bf16",), "no bfloat16 units"),
    "bf16 parameters without units": (2, ("train.precision=bf16_params",), "no bfloat16 units"),
    "size between patches": (2, ("curriculum=[{until: 1, image_size: 20}]",), "multiple of the patch size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(recipes: Recipes, case: str):
    code, settings, words = REFUSED[case]
    with pytest.raises(MmvitError) as caught:
        pretrain(recipes.config(*settings))
    assert caught.value.exit_code == code
    assert words in str(caught.value)
    assert not (recipes.folder / str(recipes.count)).exists()


def test_refusal_is_told_by_the_program(run_cli: RunCli, tiny_config: Path, tmp_path: Path):
    code, _, err = run_cli("pretrain", tiny_config, f"out={tmp_path / 'run'}", "loss.kind=sigmoid")
    assert code == 2
    assert "loss.kind=sigmoid needs model.initial_logit_bias" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_teacher_that_reads_other_tokens_is_refused(recipes: Recipes, tiny_data: Path, tmp_path: Path):
    names = (tiny_data / "names.ko.txt").read_text(encoding="utf-8").splitlines()
    train_tokenizer(names, tmp_path / "tokenizer.json", vocab_size=800)
    tokenizer = build_tokenizer(TokenizerConfig("file", str(tmp_path / "tokenizer.json")), 24)
    text = f"{{vocab_size: {tokenizer.vocab_size}, end_of_text: {tokenizer.end_of_text}}}"
    config = recipes.of("teacher", f"tokenizer.path={tmp_path / 'tokenizer.json'}", f"model.text={text}")
    with pytest.raises(UsageError, match="the teacher reads other tokens") as caught:
        pretrain(config)
    assert "mmvit embed" in str(caught.value.hint)
