"""Fixtures for comparisons with other libraries."""

from collections.abc import Callable

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def randomized() -> Callable[[nn.Module], nn.Module]:
    """A function that gives a transformer's norms, scales and biases values of their own.

    Ones and zeros would hide a swapped or unused one. Matrices are large enough for activations to matter, and biases
    and tables small enough for an epsilon to.
    """

    def randomize(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
                elif parameter.ndim == 1:
                    parameter.add_((0.02 if name.endswith("bias") else 0.2) * torch.randn_like(parameter))
                else:  # kernels, tokens and positions
                    parameter.normal_(std=0.02)
        return model.eval()

    return randomize
