"""What a user would pick instead. A peer that is not installed is None, and named as missing."""

import importlib.util
import os
import tempfile
from typing import Any

from torch import Tensor, nn

from .timing import Work

PACKAGES = {
    "Hugging Face's eager attention": "transformers",
    "Ignite's handlers": "ignite",
    "Lightning's grad_norm": "pytorch_lightning",
    "wandb.watch": "wandb",
}


def missing() -> list[str]:
    return [peer for peer, package in PACKAGES.items() if not _is_there(package)]


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def lightning_grad_norm(model: nn.Module) -> Work | None:
    """The norms as Lightning gives them, read as its loggers read them."""
    if not _is_there("pytorch_lightning"):
        return None
    from pytorch_lightning.utilities import grad_norm

    return lambda: {name: norm.item() for name, norm in grad_norm(model, 2).items()}


def ignite_grads_scalar(model: nn.Module) -> Work | None:
    """The norms as Ignite's handler writes them."""
    if not _is_there("ignite"):
        return None
    import torch
    from ignite.engine import Engine, Events
    from ignite.handlers.tensorboard_logger import GradsScalarHandler, TensorboardLogger

    logger = TensorboardLogger(log_dir=tempfile.mkdtemp())
    handler = GradsScalarHandler(model, reduction=torch.norm)
    engine = Engine(lambda engine, batch: None)
    return lambda: handler(engine, logger, Events.ITERATION_COMPLETED)


def wandb_watch(model: nn.Module) -> Work | None:
    """The histograms as `wandb.watch(model, log="all")` logs them, without its model's forward."""
    if not _is_there("wandb"):
        return None
    os.environ["WANDB_SILENT"] = "true"
    import wandb
    from wandb.integration.torch.wandb_torch import TorchHistory

    run = wandb.init(mode="offline", dir=tempfile.mkdtemp())
    history = TorchHistory()

    def watch() -> None:
        for name, parameter in model.named_parameters():
            history.log_tensor_stats(parameter.data, f"parameters/{name}")
            history.log_tensor_stats(parameter.grad.data, f"gradients/{name}")
        run.log({})

    return watch


def bert(length: int, attention: str) -> Any:
    """One layer of BERT with 8 heads of 64."""
    if not _is_there("transformers"):
        return None
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=8,
            hidden_size=512,
            num_attention_heads=8,
            num_hidden_layers=1,
            intermediate_size=2048,
            max_position_embeddings=length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,  # else sdpa is as slow as eager on the CPU
            attn_implementation=attention,
        ),
        add_pooling_layer=False,
    )


def eager_attentions(length: int, x: Tensor) -> Work | None:
    model = bert(length, "eager")
    return model and (lambda: model(inputs_embeds=x, output_attentions=True).attentions)
