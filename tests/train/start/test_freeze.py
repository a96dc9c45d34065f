"""Parameters are frozen by pattern; a pattern that does nothing is a mistake."""

import pytest
from torch import nn

from data_tools.core.errors import UsageError
from mmvit.train.start.freeze import freeze


@pytest.fixture
def model() -> nn.Module:
    towers = {
        name: nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "norm": nn.LayerNorm(2)})
        for name in ("image_tower", "text_tower")
    }
    return nn.ModuleDict(towers)


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_patterns_freeze_what_they_fit_and_nothing_else(model: nn.Module):
    everything = trained(model)
    freeze(model, [])
    assert trained(model) == everything
    freeze(model, ["image_tower.*", "*.norm.bias"])
    assert trained(model) == [
        name for name in everything if name.startswith("text_tower.") and name != "text_tower.norm.bias"
    ]


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("imagetower.*", "image_tower.*"), ("text_tower.norm.wait", "text_tower.norm.weight"), ("zzz", "image_tower")],
)
def test_pattern_that_fits_nothing_gets_near_names(model: nn.Module, pattern: str, hint: str):
    everything = trained(model)
    with pytest.raises(UsageError, match="no parameter matches") as error:
        freeze(model, [pattern])
    assert hint in error.value.hint
    assert error.value.where == "train.freeze"
    assert trained(model) == everything


def test_something_must_be_left_to_train(model: nn.Module):
    with pytest.raises(UsageError, match=r"nothing is left to train: image\*, text\*"):
        freeze(model, ["image*", "text*"])
