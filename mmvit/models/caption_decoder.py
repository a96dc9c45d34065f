"""The decoder that generates captions from the tokens of both towers."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmvit.layers.block import Block


class CaptionDecoder(nn.Module):
    """Blocks over the causal text tower's tokens with cross-attention to the image's (CoCa, Yu et al. 2022, fig. 2).

    Unlike CoCa it attends to all image tokens, not 256 pooled ones, and no class token is added to the text. The output
    layer is not tied to the token embedding, so that each can be in its own module, and on its own rank.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        *,
        image_width: int,
        vocab_size: int,
        mlp_ratio: float,
        activation: str,
        norm_eps: float,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(
                width,
                num_heads,
                mlp_ratio=mlp_ratio,
                activation=activation,
                norm_eps=norm_eps,
                causal=True,
                context_width=image_width,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.output = nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.output.weight, std=width**-0.5)

    def forward(
        self,
        text_tokens: Float[Tensor, "B L D"],
        image_tokens: Float[Tensor, "B N C"],
        image_mask: Bool[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B L vocab"]:
        """Return the logits of the token after each text token; `image_mask` is False for padding image tokens."""
        mask = None if image_mask is None else image_mask[:, None, None]
        x = text_tokens
        for block in self.blocks:
            x = block(x, context=image_tokens, context_mask=mask)
        return self.output(self.norm(x))
