"""The contract table: every loss equals its formula, in every layout on 1, 2 and 4 ranks.

    python tests/losses/contracts.py                    print the table (half a minute)
    python tests/losses/contracts.py --out rows.json    write it, with the results of mutated losses

The formulas are written term by term and computed in float64 on one rank with all rows. Ours are computed in float32
on real ranks with a part of the rows each; their values and gradients are averaged as in data-parallel training.
An error is the largest difference of any element over all scales, divided by max(1, scale, largest element); for a
solved batch, whose loss is 1e-8 or less, by the largest element. Tiles are 5 x 7 and divide nothing; the layout "auto"
keeps its own.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, get_args
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmvit.losses import contrastive, pairs
from mmvit.losses.contrastive import contrastive_loss
from mmvit.losses.distillation import distillation_loss
from mmvit.losses.masked import captioning_loss, masked_patch_loss
from mmvit.losses.sigmoid import sigmoid_loss
from mmvit.losses.token_classification import count_captions, token_classification_loss, token_weights

TOLERANCE, SOLVED_TOLERANCE = 1e-6, 1e-3
PROCESSES = (4, 2, 1)
SCALES = (1.0, 14.3, 100.0)
LAYOUTS = get_args(pairs.Layout)
LEAVES = ("image", "text", "logit_scale", "logit_bias", "logits")  # what has a gradient
Rows = dict[str, Tensor]


# The formulas: r has all rows of the batch, and scale and bias.


def softmax(r: Rows) -> Tensor:
    """Mean over images and over texts of the mean over its own partners of -log softmax.

    The partners of image i are the rows V i to V i + V - 1; others of its group are in no denominator.
    """
    logits = r["logit_scale"] * r["image"] @ r["text"].T
    owner = [j // (len(r["text"]) // len(r["image"])) for j in range(len(r["text"]))]
    groups = r["image_groups"][:, None] != r["text_groups"]

    def one_way(logits: Tensor, own: Callable[[int, int], bool], differ: Tensor) -> Tensor:
        terms = []
        for i in range(len(logits)):
            partners = [j for j in range(logits.shape[1]) if own(i, j)]
            compared = [j for j in range(logits.shape[1]) if differ[i, j] or own(i, j)]
            for j in partners:  # log(1 + sum of exp(other - own)), which keeps its digits near 0
                others = torch.stack([logits[i, k] - logits[i, j] for k in compared if k != j])
                terms.append(torch.log1p(others.exp().sum()) / len(partners))
        return sum(terms) / len(logits)

    by_image = one_way(logits, lambda i, j: owner[j] == i, groups)
    return (by_image + one_way(logits.T, lambda j, i: owner[j] == i, groups.T)) / 2


def sigmoid(r: Rows) -> Tensor:
    """Sum over all pairs of -log sigmoid(z (scale * cosine + bias)), by the number of images; z is 1 or -1."""
    total = 0
    for i in range(len(r["image"])):
        for j in range(len(r["text"])):
            logit = r["logit_scale"] * (r["image"][i] @ r["text"][j]) + r["logit_bias"]
            z = 1 if r["image_groups"][i] == r["text_groups"][j] else -1
            total = total + torch.log1p(torch.exp(-z * logit))
    return total / len(r["image"])


def distillation(r: Rows) -> Tensor:
    """Mean over images and over texts of sum p log(p / q), p the teacher's and q the student's probabilities."""
    student = r["logit_scale"] * r["image"] @ r["text"].T
    teacher = r["teacher_scale"] * r["teacher_image"] @ r["teacher_text"].T
    terms = []
    for own, other in ((student, teacher), (student.T, teacher.T)):
        for i in range(len(own)):
            p, q = other[i].exp() / other[i].exp().sum(), own[i].exp() / own[i].exp().sum()
            terms.append((p * (p / q).log()).sum())
    return sum(terms) / len(terms)


def masked(r: Rows) -> Tensor:
    """Return the mean of -log softmax over the unmasked positions of all rows."""
    terms = []
    for i, place in r["mask"].nonzero().tolist():
        logits = r["logits"][i, place]
        terms.append(logits.exp().sum().log() - logits[r["targets"][i, place]])
    return sum(terms) / len(terms)


def token_classification(r: Rows) -> Tensor:
    """Mean over images of -sum of share * log softmax over a caption's distinct tokens; shares by log(D / (1 + df))."""
    captions = [set(row) for row in r["ids"].tolist()]
    terms = []
    for logits, caption in zip(r["logits"], captions, strict=True):
        df = {token: sum(token in other for other in captions) for token in caption}
        weights = {t: max(0.0, float(torch.tensor(len(captions) / (1 + df[t])).double().log())) for t in caption - {0}}
        log_softmax = logits - logits.exp().sum().log()
        terms.append(-sum(weight * log_softmax[t] for t, weight in weights.items()) / sum(weights.values()))
    return sum(terms) / len(terms)


# The same by mmvit: r has this process's share of the rows.


def our_softmax(r: Rows, layout: str) -> Tensor:
    groups = (with_gaps(r["image_groups"]), with_gaps(r["text_groups"])) if "grouped" in r else ()
    return contrastive_loss(with_gaps(r["image"]), with_gaps(r["text"]), r["logit_scale"], *groups, layout=layout)


def our_sigmoid(r: Rows, layout: str) -> Tensor:
    groups = (r["image_groups"], r["text_groups"]) if "grouped" in r else ()
    return sigmoid_loss(r["image"], r["text"], r["logit_scale"], r["logit_bias"], *groups, layout=layout)


def our_distillation(r: Rows, layout: str) -> Tensor:
    teacher = (r["teacher_image"], r["teacher_text"], r["teacher_scale"])
    return distillation_loss(r["image"], r["text"], r["logit_scale"], *teacher, layout=layout)


def our_captioning(r: Rows, layout: str) -> Tensor:
    return captioning_loss(r["logits"], r["targets"], r["mask"], mean_over_processes(r["mask"].sum()))


def our_masked_patches(r: Rows, layout: str) -> Tensor:
    return masked_patch_loss(r["logits"], r["targets"], r["mask"], mean_over_processes(r["mask"].sum()))


def our_token_classification(r: Rows, layout: str) -> Tensor:
    counts = count_captions(r["ids"], r["logits"].shape[1])
    weights = token_weights(counts, len(r["ids"]) * dist.get_world_size(), ignored=[0])
    return token_classification_loss(r["logits"], r["ids"], weights, len(r["ids"]))


def with_gaps(rows: Tensor) -> Tensor:
    """Return the rows as a slice of a larger tensor, as for one of several captions."""
    return torch.stack([rows, rows], dim=1)[:, 1]


def mean_over_processes(count: Tensor) -> Tensor:
    total = count.double()
    dist.all_reduce(total)
    return total / dist.get_world_size()


class Case(NamedTuple):
    loss: str
    rows: Rows  # cut into the processes' shares
    shared: Rows  # the same on each process
    formula: Callable[[Rows], Tensor]
    ours: Callable[[Rows, str], Tensor]
    layouts: tuple[str, ...] = LAYOUTS
    scales: tuple[float, ...] = SCALES
    tolerance: float = TOLERANCE


def cases() -> list[Case]:
    random = torch.Generator().manual_seed(0)

    def unit_rows(number: int, width: int = 12) -> Tensor:
        return F.normalize(torch.randn(number, width, generator=random), dim=1)

    plain = {"image": unit_rows(24), "text": unit_rows(24), "image_groups": torch.arange(24)}
    plain["text_groups"] = plain["image_groups"]
    # 1 to 4 images with 1 to 6 texts a group, scattered over the batch and over the processes' shares.
    of_images = torch.cat([torch.arange(10), torch.arange(6)])[torch.randperm(16, generator=random)]
    of_texts = torch.cat([torch.arange(10), torch.arange(10), torch.arange(4)])[torch.randperm(24, generator=random)]
    several = {"image": unit_rows(16), "text": unit_rows(24), "image_groups": of_images, "text_groups": of_texts}
    joint = {"image": unit_rows(12), "text": unit_rows(24), "image_groups": of_images[:12] % 9}
    joint["text_groups"] = joint["image_groups"].repeat_interleave(2)
    same = {"image": unit_rows(24), "text": unit_rows(24), "image_groups": of_texts, "text_groups": of_texts}
    near = F.normalize(unit_rows(24, 32) + 0.1 * unit_rows(24, 32), dim=1)
    solved = plain | {"image": near, "text": F.normalize(near + 0.1 * unit_rows(24, 32), dim=1)}
    solved_same = same | {name: solved[name][of_texts] for name in ("image", "text")}
    teacher = {"teacher_image": unit_rows(24, 7), "teacher_text": unit_rows(24, 7)}
    grouped, bias = {"grouped": torch.tensor(True)}, {"logit_bias": torch.tensor(-3.0)}

    places = {
        "logits": 3 * torch.randn(8, 5, 11, generator=random),
        "targets": torch.randint(11, (8, 5), generator=random),
        "mask": torch.rand(8, 5, generator=random) < 0.6,
    }
    ids = torch.randint(19, (8, 6), generator=random)  # 0 is padding, and some stand twice in a caption
    tokens = {"logits": 3 * torch.randn(8, 19, generator=random), "ids": ids}
    return [
        Case("softmax", plain, {}, softmax, our_softmax),
        Case("softmax, equal captions", same, grouped, softmax, our_softmax),
        Case("softmax, several captions", joint, grouped, softmax, our_softmax),
        Case("softmax, solved", solved, {}, softmax, our_softmax, LAYOUTS, (50.0, 70.0), SOLVED_TOLERANCE),
        Case(
            "softmax, solved, equal captions",
            solved_same,
            grouped,
            softmax,
            our_softmax,
            LAYOUTS,
            (70.0,),
            SOLVED_TOLERANCE,
        ),
        Case("sigmoid", plain, bias, sigmoid, our_sigmoid),
        Case("sigmoid, several captions", several, bias | grouped, sigmoid, our_sigmoid),
        Case(
            "sigmoid, solved",
            solved,
            {"logit_bias": torch.tensor(-50.0)},
            sigmoid,
            our_sigmoid,
            LAYOUTS,
            (75.0,),
            SOLVED_TOLERANCE,
        ),
        Case("distillation", plain | teacher, {"teacher_scale": torch.tensor(20.0)}, distillation, our_distillation),
        Case("captioning", places, {}, masked, our_captioning, ("-",), (1.0,)),
        Case("masked patches", places, {}, masked, our_masked_patches, ("-",), (1.0,)),
        Case("token classification", tokens, {}, token_classification, our_token_classification, ("-",), (1.0,)),
    ]


def expected(case: Case, scale: float) -> Rows:
    r = {name: tensor.clone() for name, tensor in (case.rows | case.shared).items()}
    r["logit_scale"] = torch.tensor(scale)
    r = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in r.items()}
    return value_and_gradients(case.formula, r)


def value_and_gradients(loss: Callable[..., Tensor], r: Rows, *rest: Any) -> Rows:
    leaves = {name: r[name].requires_grad_() for name in LEAVES if name in r}
    value = loss(r, *rest)
    value.backward()
    return {"value": value.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def found(case: Case, scale: float, layout: str) -> Rows:
    """Return the mean of the ranks' results, as in data-parallel training, with zeros for the rows of other ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    r = {name: tensor.chunk(size)[rank].clone() for name, tensor in case.rows.items()}
    r |= {name: tensor.clone() for name, tensor in case.shared.items()} | {"logit_scale": torch.tensor(scale)}
    ours = value_and_gradients(case.ours, r, layout)
    flat = torch.cat([tensor.reshape(-1) for tensor in ours.values()])
    gathered = [torch.empty_like(flat) for _ in range(size)]
    dist.all_gather(gathered, flat)  # all in one message
    parts = dict(
        zip(ours, torch.stack(gathered).split([tensor.numel() for tensor in ours.values()], dim=1), strict=True)
    )
    return {
        name: part.reshape(-1, *ours[name].shape[1:]) / size
        if name in case.rows
        else part.mean(dim=0).reshape(ours[name].shape)
        for name, part in parts.items()
    }


def errors(case: Case, layout: str, references: dict[tuple[str, float], Rows]) -> dict[str, float]:
    """Return the largest error of the value and of each gradient, on rank 0."""
    largest: dict[str, float] = {}
    for scale in case.scales:
        ours = found(case, scale, layout)
        if dist.get_rank() == 0:
            if (case.loss, scale) not in references:
                references[case.loss, scale] = expected(case, scale)
            for name, reference in references[case.loss, scale].items():
                size = reference.abs().max().item()
                size = max(1.0, scale, size) if case.tolerance == TOLERANCE else size
                error = (ours[name] - reference).abs().max().item() / size
                largest[name] = max(largest.get(name, 0.0), error if error == error else float("inf"))
    return largest


def keep_own(gradient: Tensor) -> Tensor:
    return gradient.chunk(dist.get_world_size())[dist.get_rank()].clone()


BROKEN = {
    "a gather without gradient": lambda: patch.object(pairs, "scatter_sum", keep_own),
    "a wrong partner": lambda: patch.object(pairs, "world", lambda: (0, dist.get_world_size())),
    "columns normalised by own rows only": lambda: patch.object(contrastive, "logsumexp_over_ranks", torch.clone),
}


def work(rank: int, folder: Path) -> None:
    """Run one of the ranks; rank 0 writes the rows of the table."""
    table, references = [], {}
    for size in PROCESSES:
        if rank >= size:
            break
        store = f"file://{folder}/store-{size}"
        dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=size)
        for case in cases():
            for layout in case.layouts:
                with nullcontext() if layout == "auto" else patch.object(pairs, "CPU_TILE", (5, 7)):
                    row = {"loss": case.loss, "layout": layout, "processes": size}
                    table.append(row | {"errors": errors(case, layout, references), "allowed": case.tolerance})
        for broken, breaking in BROKEN.items() if size > 1 else ():
            with breaking():
                row = {"loss": broken, "layout": "tiles", "processes": size, "broken": True}
                table.append(row | {"errors": errors(cases()[0], "tiles", references)})
        dist.destroy_process_group()
    if rank == 0:
        (folder / "table.json").write_text(json.dumps(table))


def measure() -> list[dict[str, Any]]:
    """Start the ranks and return the table.

    They are forked: each would take two seconds to import torch, and nothing has computed here yet.
    """
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=work, args=(rank, Path(folder))) for rank in range(max(PROCESSES))]
        for rank in ranks:
            rank.start()
        try:
            for rank in ranks:
                rank.join(240)
                if rank.exitcode:
                    raise RuntimeError(f"{rank.name} ended with {rank.exitcode}")
        finally:
            for rank in ranks:
                rank.kill()
        return json.loads((Path(folder) / "table.json").read_text())


def as_text(table: list[dict[str, Any]]) -> str:
    columns = ("value", *LEAVES)
    lines = [f"{'loss':32} {'layout':7} {'processes':9}" + "".join(f"{name:>13}" for name in columns)]
    for row in table:
        cells = [f"{row['errors'][name]:13.1e}" if name in row["errors"] else f"{'-':>13}" for name in columns]
        lines.append(f"{row['loss']:32} {row['layout']:7} {row['processes']:9}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    table = measure()
    if options.out:
        options.out.write_text(json.dumps(table))
    kept = sorted((row for row in table if "broken" not in row), key=lambda row: (row["loss"], row["layout"]))
    print(as_text(kept))
    worst = dict.fromkeys((TOLERANCE, SOLVED_TOLERANCE), 0.0)
    for row in kept:
        worst[row["allowed"]] = max(worst[row["allowed"]], *row["errors"].values())
    print("\n" + "\n".join(f"largest error {error:.1e}, allowed {allowed:.0e}" for allowed, error in worst.items()))
    sys.exit(any(error > allowed for allowed, error in worst.items()))


if __name__ == "__main__":
    main()
