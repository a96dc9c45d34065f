"""The exponential moving average of the weights."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from data_tools.core.errors import CheckpointError


class WeightAverage:
    """Moving average, in float32, of all parameters of `model` that are trained, and of its running statistics.

    A `decay` of 0.999 averages over about the last thousand steps. Make it when the model is on its device and,
    where it is sharded, after that.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        state = model.state_dict(keep_vars=True)
        self._parameters = {name: t for name, t in state.items() if name not in frozen and t.is_floating_point()}
        self._averages = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` (from 0).

        The decay rises to its value as (1 + step) / (10 + step), or the random start would weigh on for long.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [parameter.float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """Return the averages by parameter name; they change with the next update."""
        return dict(self._averages)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave.

        Raises:
            CheckpointError: a name too many or too few, or another shape; nothing was changed.
        """
        saved = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in self._averages.items()}
        wrong = sorted(name for name in saved.keys() | wanted if saved.get(name) != wanted.get(name))
        if wrong:
            raise CheckpointError(
                f"the averaged weights do not fit the model: {wrong[0]}, and {len(wrong) - 1} more",
                where=f"saved {saved.get(wrong[0], 'nothing')}, trained {wanted.get(wrong[0], 'nothing')}",
                note="nothing was changed",
                hint="bring back the config that the checkpoint was made with, or start anew with another out=FOLDER",
            )
        for name, average in self._averages.items():
            average.copy_(tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model its averaged weights for evaluation or export; afterwards, and after an error, its own."""
        parameters = self._parameters.values()
        own = [parameter.detach().clone() for parameter in parameters]
        try:
            _load(parameters, self._averages.values())
            yield
        finally:
            _load(parameters, own)


@torch.no_grad()
def _load(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
