"""The exponential moving average of the weights."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from data_tools.core.errors import CheckpointError


class EmaWeights:
    """Exponential moving average, in float32, of the trained parameters of `model` and of its running statistics.

    A `decay` of 0.999 averages over about the last thousand steps. Create it after the model was moved to its device
    and sharded.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        state = model.state_dict(keep_vars=True)
        self._parameters = {name: t for name, t in state.items() if name not in frozen and t.is_floating_point()}
        self._ema = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the EMA with the weights after `step` (from 0).

        The decay rises to its value as (1 + step) / (10 + step), so that the random start is forgotten quickly.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [parameter.float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._ema.values()), weights, 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """Return the EMA weights by parameter name; the next update changes them in place."""
        return dict(self._ema)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the EMA weights that `tensors` returned.

        Raises:
            CheckpointError: names or shapes differ; nothing was changed.
        """
        saved = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in self._ema.items()}
        wrong = sorted(name for name in saved.keys() | wanted if saved.get(name) != wanted.get(name))
        if wrong:
            raise CheckpointError(
                f"the EMA weights do not fit the model: {wrong[0]}, and {len(wrong) - 1} more",
                where=f"saved {saved.get(wrong[0], 'nothing')}, trained {wanted.get(wrong[0], 'nothing')}",
                note="nothing was changed",
                hint="use the config that the checkpoint was saved with, or start a new run with another out=FOLDER",
            )
        for name, ema in self._ema.items():
            ema.copy_(tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Load the EMA weights into the model for the block, and restore its own weights afterwards."""
        parameters = self._parameters.values()
        own = [parameter.detach().clone() for parameter in parameters]
        try:
            _load(parameters, self._ema.values())
            yield
        finally:
            _load(parameters, own)


@torch.no_grad()
def _load(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
