"""Training with bfloat16 parameters and float32 masters."""

import copy

import torch
from torch import Tensor, nn

KEPT_IN_FLOAT32 = ("logit_scale", "logit_bias")  # scalars that multiply and shift all logits


class Bf16Copy:
    """A bfloat16 copy of a float32 model, for forward and backward (Micikevicius et al. 2018, section 3.1).

    The model stays the master: it is optimised, saved and evaluated. Without it, updates below 1/256 of a weight would
    be rounded away. Other than under autocast, no weight is converted in a step and gradients take half the memory.
    A step: `model` forward and backward, `pull_gradients`, optimiser on the master, `push_weights`.
    """

    def __init__(self, master: nn.Module):
        self.model = copy.deepcopy(master)
        for name, parameter in self.model.named_parameters():
            if not name.endswith(KEPT_IN_FLOAT32):
                parameter.data = parameter.data.bfloat16()
        self._masters: list[Tensor] = list(master.parameters())
        self._copies: list[Tensor] = list(self.model.parameters())

    def pull_gradients(self) -> None:
        """Add the copy's gradients, in float32, to those of the masters, and free them."""
        for master, parameter in zip(self._masters, self._copies, strict=True):
            if parameter.grad is not None:
                gradient = parameter.grad.to(torch.float32, copy=True)
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    @torch.no_grad()
    def push_weights(self) -> None:
        """Round the masters to the copy, after an update or after a checkpoint was loaded."""
        torch._foreach_copy_(self._copies, self._masters)
