"""The models that the benchmarks train."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """GPT-2's blocks: 124 M parameters in 148 tensors as it comes."""

    def __init__(
        self,
        layers: int = 12,
        width: int = 768,
        heads: int = 12,
        tokens: int = 50257,
        length: int = 1024,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.token = nn.Embedding(tokens, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token.weight)  # tied


def trainer(model: nn.Module, batch: int, length: int):
    """A function that takes one training step of `model`, a GPT or what compiles one."""
    original = getattr(model, "_orig_mod", model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    tokens = torch.randint(original.tokens, (batch, length))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()

    return step


def with_gradients(tensors: int, size: int) -> nn.Module:
    """A model of so many parameters of that size, each with a gradient."""
    model = nn.Module()
    for at in range(tensors):
        parameter = nn.Parameter(torch.randn(size))
        parameter.grad = torch.randn(size)
        model.register_parameter(f"p{at}", parameter)
    return model
