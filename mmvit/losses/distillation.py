"""Distillation of a teacher's image-text similarities into a student."""

import torch
from jaxtyping import Float
from torch import Tensor

from mmvit.losses.contrastive import add_log_weights, log_normalisers
from mmvit.losses.pairs import Layout, Pairs, Tile, differentiable


def distillation_loss(
    image: Float[Tensor, "b E"],
    text: Float[Tensor, "b E"],
    logit_scale: Float[Tensor, ""],
    teacher_image: Float[Tensor, "b T"],
    teacher_text: Float[Tensor, "b T"],
    teacher_scale: Float[Tensor, ""],
    *,
    layout: Layout = "auto",
) -> Float[Tensor, ""]:
    """Return the mean KL(teacher || student) of each image's softmax over the texts and each text's over the images.

    This is the affinity mimicking of TinyCLIP (Wu et al. 2023, section 3.1) minus the teacher's entropy, so that it
    is 0 where the student agrees. Takes the rows of this rank and pairs them with those of all ranks, as
    `contrastive_loss` does; the teacher gets no gradient.
    """

    def compute(_: bool, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, list[Tensor]]:
        teacher = Pairs(teacher_image.float(), teacher_text.float(), teacher_scale.float(), layout=layout)
        return _divergence(Pairs(image, text, scale, layout=layout), teacher)

    return differentiable(compute, image, text, logit_scale)


def _divergence(student: Pairs, teacher: Pairs) -> tuple[Tensor, list[Tensor]]:
    own_rows, own_columns = log_normalisers(student)
    rows, columns = log_normalisers(teacher)
    add_log_weights(student, own_rows, own_columns)
    add_log_weights(teacher, rows, columns)
    value = torch.zeros_like(student.logit_scale)
    teacher_tiles = teacher.walk(columns)

    def slope(tile: Tile) -> Tensor:
        expected = next(teacher_tiles).logits
        slopes = tile.space.zero_()
        at_row, at_column = (tile.rows, None), tile.columns
        for own_norm, norm in ((own_rows[at_row], rows[at_row]), (own_columns[at_column], columns[at_column])):
            log_own, log_expected = tile.logits - own_norm, expected - norm
            probability = log_expected.exp()
            value.add_((probability * (log_expected - log_own)).sum())
            slopes.add_(log_own.exp_()).sub_(probability)
        return slopes

    gradients = student.gradients(slope, own_columns)
    return value, gradients
