"""Cross-entropy with soft targets, with or without distillation from a teacher."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Count = float | int | Tensor


def soft_targets(labels: Int[Tensor, "b"], num_classes: int, smoothing: float = 0.0) -> Float[Tensor, "b C"]:
    """Return one-hot rows with label smoothing (Szegedy et al. 2016, section 7)."""
    return F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def classification_loss(logits: Float[Tensor, "b C"], targets: Float[Tensor, "b C"], count: Count) -> Float[Tensor, ""]:
    """Return the cross-entropy with targets that may be soft.

    Args:
        logits: Class logits.
        targets: Class probabilities, from `soft_targets` or mixup; each row sums to 1.
        count: Images of the global step divided by the number of ranks; micro-batches are summed, ranks averaged.
    """
    return -(targets * F.log_softmax(logits.float(), dim=1)).sum() / count


def soft_distillation_loss(
    logits: Float[Tensor, "b C"],
    targets: Float[Tensor, "b C"],
    teacher_logits: Float[Tensor, "b T"],
    count: Count,
    *,
    token_logits: Float[Tensor, "b C"] | None = None,
    weight: float = 0.1,
    temperature: float = 3.0,
    reduction: str = "batch",
) -> Float[Tensor, ""]:
    """Return (1 - weight) CE(student, targets) + weight * temperature^2 KL of the softened logits (DeiT, equation 2).

    The divergence is KL(teacher || student), as in DeiT's released code and in Hinton et al. 2015; the equation in
    Touvron et al. 2021 has the opposite order. The teacher gets no gradient.

    Args:
        logits: Logits of the student's class head.
        targets: As for `classification_loss`.
        teacher_logits: Logits of the teacher, for the same classes.
        count: As for `classification_loss`.
        token_logits: Logits of the distillation head, which then learns from the teacher; None: the class head does.
        weight: Weight of the teacher, lambda; 0.1 in the paper.
        temperature: tau; 3 in the paper.
        reduction: "batch" divides the divergence by the number of images; "element" by images times classes, as the
            released code does: with 1000 classes, a thousandth.

    Raises:
        ValueError: The teacher has another number of classes, or the reduction is unknown.
    """
    if reduction not in ("batch", "element"):
        raise ValueError(f"reduction {reduction!r} is unknown; choose batch or element")
    student, teacher = _pair(logits, token_logits, teacher_logits)
    own = F.log_softmax(student / temperature, dim=1)
    expected = F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(own, expected, reduction="sum", log_target=True) * temperature**2
    if reduction == "element":
        divergence = divergence / logits.shape[1]
    return (1 - weight) * classification_loss(logits, targets, count) + weight * divergence / count


def hard_distillation_loss(
    logits: Float[Tensor, "b C"],
    targets: Float[Tensor, "b C"],
    teacher_logits: Float[Tensor, "b T"],
    count: Count,
    *,
    token_logits: Float[Tensor, "b C"] | None = None,
    weight: float = 0.5,
) -> Float[Tensor, ""]:
    """Return (1 - weight) CE(student, targets) + weight * CE(student, argmax of the teacher) (DeiT, equation 3).

    The teacher's classes are not smoothed. Arguments and errors are those of `soft_distillation_loss`.
    """
    student, teacher = _pair(logits, token_logits, teacher_logits)
    distilled = F.cross_entropy(student, teacher.argmax(dim=1), reduction="sum") / count
    return (1 - weight) * classification_loss(logits, targets, count) + weight * distilled


def _pair(logits: Tensor, token_logits: Tensor | None, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the student logits that learn from the teacher, and the teacher's logits."""
    student = logits if token_logits is None else token_logits
    if student.shape[1] != teacher_logits.shape[1]:
        raise ValueError(
            f"the teacher has {teacher_logits.shape[1]} classes and the student {student.shape[1]}; "
            "distillation needs a teacher of the same classes in the same order"
        )
    return student.float(), teacher_logits.detach().float()
