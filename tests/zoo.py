"""Real models with random weights and peaked attention, what they attend to, and traps.

Each entry of `ZOO` gives a configuration of `transformers`; the truth is what its eager form
returns as attentions, in float64. Those of `TORCH` are torch.nn's; the truth is what their
nn.MultiheadAttention returns when it is asked for weights. `TRAPS` have no attention.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE = {**SIZE, **STILL, "image_size": 16, "patch_size": 4}
GROUPED = {**SIZE, "num_key_value_heads": 2}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

SOURCE = {
    **{"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "d_model": 32},
    **{"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "dropout": 0.0},
    **{"vocab_size": 99, "decoder_start_token_id": 2, **ENDS},
}

ZOO: dict[str, dict] = {
    "Albert": {**SIZE, **STILL, "embedding_size": 32},
    "Bert": {**SIZE, **STILL},
    "Bart": {**SOURCE, "max_position_embeddings": 64},
    "BigBird": {**SIZE, **STILL, "attention_type": "original_full"},
    "Bloom": {
        **{"hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 99},
        **{"hidden_dropout": 0.0, "attention_dropout": 0.0},
    },
    "Cohere": {**GROUPED, **ENDS},
    "DebertaV2": {
        **SIZE,
        **STILL,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
    },
    "DistilBert": {
        **{"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 64, "vocab_size": 99},
        **{"dropout": 0.0, "attention_dropout": 0.0},
    },
    "Electra": {**SIZE, **STILL, "embedding_size": 32},
    "GPT2": {
        **{"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 99, "n_positions": 64},
        **{"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, **ENDS},
    },
    "GPTNeoX": {**SIZE, **ENDS},
    "Gemma2": {**GROUPED, "head_dim": 8},
    "GptOss": {**GROUPED, "head_dim": 8, "num_local_experts": 4, "sliding_window": 6, **ENDS},
    "Llama": GROUPED,
    "MPNet": {**SIZE, **STILL},
    "Mistral": {**GROUPED, "sliding_window": 6},
    "Mixtral": {**GROUPED, "num_local_experts": 4},
    "OPT": {
        **{"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 64},
        **{"vocab_size": 99, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
        "dropout": 0.0,
    },
    "Phi": {**SIZE, "resid_pdrop": 0.0, **ENDS},
    "Qwen2": GROUPED,
    "Roberta": {**SIZE, **STILL},
    "T5": {
        **{"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2, "d_ff": 64},
        **{"vocab_size": 99, "dropout_rate": 0.0, "decoder_start_token_id": 0},
    },
    "ViT": IMAGE,
    "Whisper": {**SOURCE, "num_mel_bins": 8, "max_source_positions": 20},
    "XLNet": {
        **{"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
        "dropout": 0.0,
    },
}


def build(name: str, implementation: str) -> nn.Module:
    """The model with the same weights for every implementation of attention.

    Raises:
        ValueError: the model has no such implementation.
    """
    configuration = getattr(transformers, f"{name}Config")(**ZOO[name])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(
            configuration, attn_implementation=implementation
        )
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "embed" in parameter_name else 0.4)
    return model


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """A batch of two; the second has padding at its end."""
    generator = torch.Generator().manual_seed(1)
    if "pixel_values" in model.main_input_name:
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    tokens = {"decoder_input_ids": torch.randint(3, 99, (2, 7), generator=generator)}
    tokens = tokens if model.config.is_encoder_decoder else {}
    if "input_features" in model.main_input_name:
        return {"input_features": torch.randn(2, 8, 40, generator=generator), **tokens}
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return {
        "input_ids": torch.randint(3, 99, (2, 12), generator=generator),
        "attention_mask": mask,
        **tokens,
    }


@torch.no_grad()
def entropies(model: nn.Module, batch: dict[str, Tensor]) -> list[float]:
    """The entropy of each map in the order they run, from the weights the eager model returns.

    A row that sees no key has uniform weights there: it is left out.
    """
    output = model(**batch, output_attentions=True)
    if model.config.is_encoder_decoder:
        pairs = zip(output.decoder_attentions, output.cross_attentions, strict=True)
        maps = [*output.encoder_attentions, *(weights for pair in pairs for weights in pair)]
    else:
        maps = output.attentions
    found = []
    for weights in maps:
        rows = torch.special.entr(weights.double()).sum(-1)  # (B, H, L)
        uniform = (weights.amax(-1) == weights.amin(-1)) & (weights.amax(-1) > 0)
        found.append(rows[~uniform].mean().item())
    return found


class Crossed(nn.Module):
    """nn.MultiheadAttention between widths, with a learnt key and a zero beside the others."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            32, 4, kdim=24, vdim=16, add_bias_kv=True, add_zero_attn=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[:5, :, :24], x[:5, :, :16], need_weights=False)[0]


def _layers(kind: type[nn.Module], **arguments: bool) -> nn.Module:
    return kind(32, 4, 64, dropout=0.0, batch_first=True, **arguments)


class Decoder(nn.Module):
    """nn.TransformerDecoder, causal, over a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(_layers(nn.TransformerDecoderLayer), 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.decoder(x, x.flip(1)[:, :6], tgt_mask=mask, tgt_is_causal=True)


class Whole(nn.Module):
    """nn.Transformer from one end to the other, norm first."""

    def __init__(self) -> None:
        super().__init__()
        layers = {"num_encoder_layers": 2, "num_decoder_layers": 1, "dim_feedforward": 64}
        self.transformer = nn.Transformer(
            32, 4, **layers, dropout=0.0, batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.rand(12, 12, generator=torch.Generator().manual_seed(2)) < 0.3
        return self.transformer(x, x[:, :5], src_mask=mask.fill_diagonal_(False))


TORCH = {
    "TransformerEncoder": lambda: nn.TransformerEncoder(_layers(nn.TransformerEncoderLayer), 2),
    "TransformerDecoder": Decoder,
    "Transformer": Whole,
    "MultiheadAttention": Crossed,
}


def build_torch(name: str) -> nn.Module:
    """One of `TORCH` with peaked attention."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = TORCH[name]()
        for parameter_name, parameter in model.named_parameters():
            if "in_proj_weight" in parameter_name or "proj_weight" in parameter_name:
                parameter.normal_(std=0.5)
    return model


@torch.no_grad()
def torch_entropies(model: nn.Module, x: Tensor) -> list[float]:
    """The entropy of each map in the order they run, from the weights torch.nn returns.

    They are returned in training mode alone as they are used: in eval they may be nested.
    """
    found = []

    def ask(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        asked = kwargs | {"need_weights": True, "average_attn_weights": False}
        weights = module.forward(*args, **asked)[1]
        found.append(torch.special.entr(weights.double()).sum(-1).mean().item())

    handles = [
        module.register_forward_hook(ask, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    ]
    model.train()(x)
    for handle in handles:
        handle.remove()
    return found


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(16, 4), nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x):
        weights = self.gate(x).softmax(-1)  # (B, L, E)
        outputs = torch.einsum("bld,edf->blef", x, self.experts)
        return torch.einsum("ble,blef->blf", weights, outputs)


class Codebook(nn.Module):
    def __init__(self):
        super().__init__()
        self.codes = nn.Embedding(32, 16)

    def forward(self, x):
        return (x @ self.codes.weight.t().contiguous() * 2).softmax(-1) @ self.codes.weight


class LinearAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(q.softmax(-1) @ (k.softmax(-2).mT @ v)).softmax(-1) @ x.mT


class Contrastive(nn.Module):
    def forward(self, x):
        x = F.normalize(x[:, 0], dim=-1)
        return (
            F.cross_entropy(x @ x.t() / 0.1, torch.arange(len(x))) + (x @ x.t()).softmax(-1).sum()
        )


class Vocabulary(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(50, 16)

    def forward(self, x):
        return F.linear(x, self.token.weight).softmax(-1)


class Channels(nn.Module):
    """Squeeze-and-excitation: a gate by a softmax, times the features."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 16)

    def forward(self, x):
        return (x * self.gate(x.mean(1, keepdim=True)).softmax(-1)) @ x.mT


TRAPS = [Router, Codebook, LinearAttention, Contrastive, Vocabulary, Channels]
