"""Models of timm by name; timm is imported by the first use of one."""

from functools import cache
from typing import Any

from data_tools.core.errors import did_you_mean


def create_timm(name: str, image_size: int | None) -> tuple[Any, bool]:
    """Create the model, and return it with whether its image size is fixed; the default size is the model's own."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"the image tower timm:{name} needs timm; pip install timm") from error
    names = timm.list_models(exclude_filters="*_enc")  # encoders of language models, which do not pool
    if name not in names:
        # A tag such as .a1_in1k names weights, not another architecture.
        hint = did_you_mean(name.partition(".")[0], names) or "timm.list_models() lists all"
        raise ValueError(f"timm has no model {name!r}; {hint}")
    settings = timm.get_pretrained_cfg(name)
    fixed = settings is not None and settings.fixed_input_size
    options: dict[str, Any] = {"img_size": image_size} if fixed and image_size is not None else {}
    return timm.create_model(name, pretrained=False, num_classes=0, **options), fixed


@cache
def timm_sizes(name: str) -> tuple[int, bool]:
    """Return the stride, and whether the model's image size is fixed."""
    import torch

    with torch.device("meta"):
        model, takes_one_size = create_timm(name, None)
    return int(model.feature_info[-1]["reduction"]), takes_one_size
