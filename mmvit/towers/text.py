"""The text transformer."""

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from mmvit.layers.attention import Attention
from mmvit.layers.block import Block
from mmvit.layers.feed_forward import FeedForward
from mmvit.layers.pooling import pool_end_of_text
from mmvit.towers.config import TextConfig as TextConfig
from mmvit.towers.contract import Tower, TowerOutput


class TextTransformer(Tower):
    """Transformer over token ids (Radford et al. 2021, section 2.4; SigLIP, Zhai et al. 2023, section 4).

    Ids after end-of-text do not change the result, so callers can truncate the ids to the longest text of the
    batch and pad shorter ones with any id:

    - with pooling at end-of-text, a causal tower does not attend to them, and a bidirectional one masks them;
    - with pooling at the last position, they are replaced by end-of-text ids up to the context length, which all tokens
      attend to: SigLIP is trained this way, with one id for end-of-text and padding. Such a tower always processes the
      whole context length.
    """

    def __init__(
        self,
        embed: nn.Embedding,
        context_length: int,
        depth: int,
        num_heads: int,
        *,
        end_of_text: int,
        mlp_ratio: float,
        activation: str,
        norm_eps: float,
        causal: bool,
        pool: str,
    ):
        super().__init__()
        if pool not in ("end_of_text", "last"):
            raise ValueError(f"pool {pool!r} is unknown; choose from ['end_of_text', 'last']")
        self.width = width = embed.embedding_dim
        self.context_length = context_length
        self.end_of_text = end_of_text
        self.causal = causal
        self.pool = pool
        self.token_embedding = embed
        self.positions = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio=mlp_ratio, activation=activation, norm_eps=norm_eps, causal=causal)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as OpenAI's CLIP does: tables with std 0.02 and 0.01, matrices by width and depth."""
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
        """Encode token ids; each row contains an end-of-text id, and L is at most the context length."""
        ends = (ids == self.end_of_text).long()
        follows = ends.cumsum(dim=1) > ends  # [B, L], True after the first end-of-text
        mask = None
        if self.pool == "last":
            ids = ids.masked_fill(follows, self.end_of_text)
            ids = F.pad(ids, (0, self.context_length - ids.shape[1]), value=self.end_of_text)
        elif not self.causal:
            mask = ~follows[:, None, None]  # [B, 1, 1, L]
        x = self.token_embedding(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        tokens = self.norm(x)
        pooled = tokens[:, -1] if self.pool == "last" else pool_end_of_text(tokens, ids, self.end_of_text)
        return TowerOutput(pooled, tokens)
