"""Real models with random weights and peaked attention, and what they attend to.

Each entry of `ZOO` gives a configuration of `transformers`; the truth is what its eager form
returns as attentions, in float64.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import Tensor, nn

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

ZOO: dict[str, dict] = {
    "Albert": {**SIZE, **STILL, "embedding_size": 32},
    "Bert": {**SIZE, **STILL},
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
    "ViT": IMAGE,
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
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return {
        "input_ids": torch.randint(3, 99, (2, 12), generator=generator),
        "attention_mask": mask,
    }


@torch.no_grad()
def entropies(model: nn.Module, batch: dict[str, Tensor]) -> list[float]:
    """The entropy of each layer's attention, from the weights that the eager model returns.

    A row that sees no key has uniform weights there: it is left out.
    """
    found = []
    for weights in model(**batch, output_attentions=True).attentions:
        rows = torch.special.entr(weights.double()).sum(-1)  # (B, H, L)
        uniform = (weights.amax(-1) == weights.amin(-1)) & (weights.amax(-1) > 0)
        found.append(rows[~uniform].mean().item())
    return found
