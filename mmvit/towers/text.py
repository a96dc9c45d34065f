"""The causal text transformer."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mmvit.layers.attention import Attention
from mmvit.layers.block import Block
from mmvit.layers.feed_forward import FeedForward
from mmvit.layers.pooling import pool_end_of_text
from mmvit.towers.contract import Tower, TowerOutput


@dataclass
class TextConfig:
    """Shape of a text tower; the defaults are those of CLIP ViT-B."""

    vocab_size: int = 49408
    context_length: int = 77  # tokens
    end_of_text: int = 49407  # token id
    width: int = 512
    depth: int = 12
    num_heads: int = 8
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    norm_eps: float = 1e-5
    identity_start: bool = False  # zero the blocks' output maps at the start


class TextTransformer(Tower):
    """Causal transformer over token ids, pooled at end-of-text (Radford et al. 2021, section 2.4).

    Attention is causal, so that what follows end-of-text cannot change the result: callers may cut the
    ids to the longest text of the batch.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        width: int,
        depth: int,
        num_heads: int,
        *,
        end_of_text: int,
        mlp_ratio: float,
        activation: str,
        norm_eps: float,
    ):
        super().__init__()
        self.width = width
        self.context_length = context_length
        self.end_of_text = end_of_text
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio=mlp_ratio, activation=activation, norm_eps=norm_eps, causal=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as OpenAI's CLIP does: tables 0.02 and 0.01, matrices by width and depth."""
        width, depth = self.width, max(len(self.blocks), 1)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        for module in self.modules():
            if isinstance(module, Attention):
                for linear in (module.q, module.k, module.v):
                    nn.init.normal_(linear.weight, std=width**-0.5)
                    nn.init.zeros_(linear.bias)
                nn.init.normal_(module.out.weight, std=width**-0.5 * (2 * depth) ** -0.5)
                nn.init.zeros_(module.out.bias)
            elif isinstance(module, FeedForward):
                nn.init.normal_(module.up.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(module.down.weight, std=width**-0.5 * (2 * depth) ** -0.5)

    def forward(self, ids: Int[Tensor, "B L"]) -> TowerOutput:
        """Encode ids; each row holds an end-of-text id, and L is at most the context length."""
        x = self.token_embedding(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        tokens = self.norm(x)
        return TowerOutput(pool_end_of_text(tokens, ids, self.end_of_text), tokens)
