"""Multi-head attention."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmvit.layers.rotary import rotate

# Bool: True where a query attends to a key. Float: added to the scores. 2 to 4 dimensions, broadcast to [B, H, N, M].
Mask = Bool[Tensor, "..."] | Float[Tensor, "..."] | None


class Attention(nn.Module):
    """Multi-head attention, softmax(Q K^T / sqrt(d_h)) V (Vaswani et al. 2017, section 3.2).

    Query, key and value are three linear layers rather than one packed matrix, so that low-rank adapters,
    freezing by name and matrix optimisers can address each of them. Without a context this is self-attention;
    `context_width` is the width of the context where it differs from `width`. With `qk_norm` the queries and keys of
    each head are normalised (ViT-22B, Dehghani et al. 2023, section 2). A query whose keys are all masked gets zeros.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        causal: bool = False,
        context_width: int | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.causal = causal
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(context_width or width, width)
        self.v = nn.Linear(context_width or width, width)
        self.out = nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width // num_heads, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.LayerNorm(width // num_heads, eps=norm_eps) if qk_norm else None

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        mask: Mask = None,
        context: Float[Tensor, "B M C"] | None = None,
        rotary: Float[Tensor, "#B P d"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Attend within each row; `rotary` is the table that rotates the last P queries and keys."""
        q, k = self._queries_and_keys(x, context, rotary)
        v = self._heads(self.v(x if context is None else context))
        mask = self._full_mask(mask, q, k)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and mask is None)
        return self.out(y.transpose(1, 2).flatten(2))

    def weights(
        self,
        x: Float[Tensor, "B N D"],
        mask: Mask = None,
        context: Float[Tensor, "B M C"] | None = None,
        rotary: Float[Tensor, "#B P d"] | None = None,
    ) -> Float[Tensor, "B H N M"]:
        """Return the attention weights, for visualisation; the arguments are those of `forward`."""
        q, k = self._queries_and_keys(x, context, rotary)
        mask = self._full_mask(torch.tensor(True, device=x.device) if mask is None else mask, q, k)
        scores = q @ k.mT * q.shape[3] ** -0.5
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(dim=3).nan_to_num(0.0)  # NaN: all keys of a query are masked

    def _queries_and_keys(self, x: Tensor, context: Tensor | None, rotary: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k = self._heads(self.q(x)), self._heads(self.k(x if context is None else context))  # [B, H, N, d_h]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return (q, k) if rotary is None else (rotate(q, rotary), rotate(k, rotary))

    def _full_mask(self, mask: Any, q: Tensor, k: Tensor) -> Any:
        """Convert a mask to the dtype of the scores and combine it with the causal mask, if any; None stays None."""
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        if mask is None or not self.causal:
            return mask
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        return mask & causal if mask.dtype == torch.bool else mask.where(causal, -torch.inf)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
