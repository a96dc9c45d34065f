"""Zero-shot classification: a classifier made of class names and prompt templates."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from data_tools.core.errors import UsageError
from data_tools.sample.content import Label
from mmvit.data.prompts import PLACEHOLDER, check_template, fill, load_templates
from mmvit.data.source import SampleSource
from mmvit.eval.classify import Accuracy, evaluate_classifier
from mmvit.eval.encoder import Encoder
from mmvit.models.classifier import ImageClassifier, zero_shot_head


def class_embeddings(
    encoder: Encoder, class_names: Sequence[str], templates: str | Sequence[str]
) -> Float[Tensor, "C E"]:
    """Average each class's unit text embeddings over the templates and renormalise (Radford et al. 2021, 3.1.4).

    Args:
        encoder: embeds the prompts.
        class_names: one per class.
        templates: prompt templates, each with one `{}`; or the name of a built-in set, or the path of a file of them.

    Raises:
        UsageError: a template without exactly one placeholder; no set of that name; a text for the class names.
    """
    if isinstance(class_names, str):
        names = [name.strip() for name in class_names.split(",")]
        raise UsageError(f"class names must be a list, got the text {class_names!r}", hint=f"give a list: {names}")
    if isinstance(templates, str):
        templates = [templates] if PLACEHOLDER.search(templates) else load_templates(templates)
    if not class_names or not templates:
        raise UsageError(f"there are no {'templates' if class_names else 'class names'}", hint="give at least one")
    for template in templates:
        check_template(template, where="templates")
    prompts = [fill(template, name) for name in class_names for template in templates]
    rows = encoder.encode_text(prompts).unflatten(0, (len(class_names), len(templates)))  # [C, K, E]
    return F.normalize(rows.mean(dim=1), dim=-1)


def zero_shot_classifier(
    encoder: Encoder, class_names: Sequence[str], templates: str | Sequence[str] = "simple"
) -> ImageClassifier:
    """Return the image classifier whose head is the class embeddings times the logit scale, in evaluation mode.

    Arguments and errors are those of `class_embeddings`; "simple" is the template "a photo of a {}.".
    """
    weights = class_embeddings(encoder, class_names, templates).to(encoder.device)
    model, head = encoder.model, zero_shot_head(weights, encoder.logit_scale)
    projection = model.image_projection
    return ImageClassifier(model.image_tower, model.pixel_norm, head, class_names, image_projection=projection).eval()


def evaluate_zero_shot(
    encoder: Encoder,
    source: SampleSource,
    class_names: Sequence[str],
    templates: str | Sequence[str],
    limit: int | None = None,
    before_each_batch: Callable[[], None] = lambda: None,
) -> Accuracy:
    """Measure the accuracy of the zero-shot classifier; see `evaluate_classifier`.

    Class names that differ only in case are one class, the first of them, because no classifier can distinguish them.
    """
    first_of_name: dict[str, int] = {}
    for i, name in enumerate(class_names):
        first_of_name.setdefault(name.casefold(), i)
    unique = list(first_of_name.values())
    position = {name: i for i, name in enumerate(first_of_name)}
    class_of_label: dict[Label, int] = {i: position[name.casefold()] for i, name in enumerate(class_names)}
    class_of_label |= {name: position[name.casefold()] for name in class_names}
    found = evaluate_classifier(
        zero_shot_classifier(encoder, [class_names[i] for i in unique], templates),
        source,
        encoder.image_size,
        limit,
        before_each_batch,
        class_of_label=class_of_label,
        batch_size=encoder.batch_size,
    )
    line_of_class = torch.tensor(unique)
    return found._replace(labels=line_of_class[found.labels], best=line_of_class[found.best])
