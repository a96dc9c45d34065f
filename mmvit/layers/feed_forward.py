"""The position-wise feed-forward network and its activations."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmvit.layers.activation import Activation as Activation


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the GELU approximation that OpenAI's CLIP weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation element-wise."""
        return x * torch.sigmoid(1.702 * x)


class TanhGELU(nn.GELU):
    """The tanh approximation of GELU, the default of the original JAX ViT."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


# Three different functions that are often confused: swapping them changes CLIP embeddings by 3e-3.
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "gelu_tanh": TanhGELU, "quick_gelu": QuickGELU}


class FeedForward(nn.Module):
    """Two linear layers around an activation: W2 act(W1 x) (ViT, Dosovitskiy et al. 2021, section 3.1)."""

    def __init__(self, width: int, hidden_width: int, activation: str = "gelu"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is unknown; choose from {sorted(ACTIVATIONS)}")
        self.up = nn.Linear(width, hidden_width)
        self.activation = ACTIVATIONS[activation]()
        self.down = nn.Linear(hidden_width, width)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Transform each token independently."""
        return self.down(self.activation(self.up(x)))
