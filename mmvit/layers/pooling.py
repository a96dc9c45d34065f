"""Pooling: a sequence of tokens to one vector."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmvit.layers.attention import Attention
from mmvit.layers.feed_forward import FeedForward

Mask = Bool[Tensor, "B N"] | None  # False for padding


def pool_class(tokens: Float[Tensor, "B N D"], mask: Mask = None) -> Float[Tensor, "B D"]:
    """Return the class token, which comes first (ViT, equation 4)."""
    return tokens[:, 0]


def pool_mean(tokens: Float[Tensor, "B N D"], mask: Mask = None) -> Float[Tensor, "B D"]:
    """Return the mean of all tokens."""
    if mask is None:
        return tokens.mean(dim=1)
    return (tokens * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def pool_end_of_text(tokens: Float[Tensor, "B L D"], ids: Int[Tensor, "B L"], end_of_text: int) -> Float[Tensor, "B D"]:
    """Return the token at each row's first end-of-text id (Radford et al. 2021, section 2.4)."""
    # CLIP's code uses argmax(ids), which is the same position because end-of-text is its vocabulary's largest id.
    position = (ids == end_of_text).int().argmax(dim=1)
    return tokens[torch.arange(len(ids), device=ids.device), position]


class AttentionPool(nn.Module):
    """A learned probe attends to all tokens, then an MLP with a residual (Zhai et al. 2022, section 3.3; SigLIP)."""

    def __init__(self, width: int, num_heads: int, *, mlp_ratio: float, activation: str, norm_eps: float):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(width))
        self.attention = Attention(width, num_heads)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.feed_forward = FeedForward(width, round(width * mlp_ratio), activation)
        nn.init.normal_(self.probe, std=width**-0.5)

    def forward(self, tokens: Float[Tensor, "B N D"], mask: Mask = None) -> Float[Tensor, "B D"]:
        """Pool each row."""
        probes = self.probe.to(tokens.dtype).expand(len(tokens), 1, -1)
        x = self.attention(probes, None if mask is None else mask[:, None, None], context=tokens)
        return (x + self.feed_forward(self.norm(x)))[:, 0]


POOLS = {"class": pool_class, "mean": pool_mean}  # pooling without parameters
