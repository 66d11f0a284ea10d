"""Small models that several tests train."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    """Attention as a user writes it; `probabilities` computes what it attends to, in float64."""

    def __init__(self, width: int = 16, heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        return qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, L, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        q, k, _ = self.split(x).double()
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if self.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores.softmax(-1)


class Block(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal)
        self.drop = nn.Dropout(0.1)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm(x)))
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Peaked attention, dropout, and an output that names its uncertainties."""

    def __init__(self, layers: int = 2, causal: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(causal=causal) for _ in range(layers))
        self.head = nn.Linear(16, 3)
        with torch.no_grad():
            for block in self.blocks:
                block.attention.qkv.weight.mul_(3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        logits = self.head(x).mean(1)
        p = logits.softmax(-1)
        return {"logits": logits, "epistemic": p.var(-1), "aleatoric": (p * (1 - p)).sum(-1)}


def without_dropout(model: nn.Module) -> nn.Module:
    """`model`, whose dropout does nothing."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def entropy(probabilities: Tensor) -> float:
    """The mean entropy in nats of float64 probabilities."""
    return torch.special.entr(probabilities).sum(-1).mean().item()


def batch(seed: int, size: int = 4, length: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, length, 16, generator=generator)
    return x, torch.randint(3, (size,), generator=generator)
