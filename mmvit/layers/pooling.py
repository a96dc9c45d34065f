"""From a row of tokens to one vector."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def pool_class(tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B D"]:
    """Take the class token, which stands first (ViT, equation 4)."""
    return tokens[:, 0]


def pool_mean(tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B D"]:
    """Average all tokens."""
    return tokens.mean(dim=1)


def pool_end_of_text(tokens: Float[Tensor, "B L D"], ids: Int[Tensor, "B L"], end_of_text: int) -> Float[Tensor, "B D"]:
    """Take the token at each row's first end-of-text id (Radford et al. 2021, section 2.4)."""
    # CLIP's code takes argmax(ids), which is this position because end-of-text has its vocabulary's largest id.
    position = (ids == end_of_text).int().argmax(dim=1)
    return tokens[torch.arange(len(ids), device=ids.device), position]


POOLS = {"class": pool_class, "mean": pool_mean}
