"""Multi-head attention."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention, softmax(Q K^T / sqrt(d_h)) V (Vaswani et al. 2017, section 3.2).

    Query, key and value are three linear maps and not one packed matrix, so that low-rank adapters,
    freezing by name and matrix optimisers can reach each of them. Without a context the tokens attend to themselves;
    `context_width` is that of the context where it is another.
    """

    def __init__(self, width: int, num_heads: int, *, causal: bool = False, context_width: int | None = None):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.causal = causal
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(context_width or width, width)
        self.v = nn.Linear(context_width or width, width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        mask: Bool[Tensor, "*shape"] | None = None,
        context: Float[Tensor, "B M C"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Attend within each row; `mask` [N, M] or [B, 1, N, M] is True where a query sees a key."""
        context = x if context is None else context
        q, k, v = self._heads(self.q(x)), self._heads(self.k(context)), self._heads(self.v(context))  # [B, H, N, d_h]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
