"""Trainers without a callback of ours: attached once before, the right steps and tags after."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import accelerate
import pytest
import pytorch_lightning as lightning
import torch
import transformers
from ignite.engine import Engine, create_supervised_trainer
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.utils.data import DataLoader, TensorDataset

from bthooks import attach

from .conftest import read
from .models import Transformer, without_dropout


class Classifier(Transformer):
    """As the trainers want it: a loss where labels are given."""

    def forward(self, x, labels=None):
        output = super().forward(x)
        if labels is not None:
            output = {"loss": F.cross_entropy(output["logits"], labels), **output}
        return output


def network():
    torch.manual_seed(0)
    return without_dropout(Classifier())


def samples(count=24):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 6, 16, generator=generator), torch.arange(count) % 3


def expected(steps, parts, clip, rate=0.1, size=4):
    """The totals of a plain loop before and after clipping."""
    model, (x, y) = network(), samples()
    optimizer = torch.optim.SGD(model.parameters(), rate)
    found, batches = [], zip(x.split(size), y.split(size), strict=True)
    for _ in range(steps):
        for _ in range(parts):
            a, b = next(batches)
            (model(a, b)["loss"] / parts).backward()
        gradients = [p.grad for p in model.parameters()]
        before = get_total_norm(gradients).item()
        if clip:
            clip_grad_norm_(model.parameters(), clip)
        found.append((before, get_total_norm(gradients).item()))
        optimizer.step()
        optimizer.zero_grad()
    return found


def assert_like_a_plain_loop(run, steps, parts, clip):
    totals = expected(steps, parts, clip)
    for tag, at in (("gradients/total_norm_before_clip", 0), ("gradients/total_norm", 1)):
        points = run.scalars[tag]
        assert [step for step, _ in points] == list(range(steps))
        assert [value for _, value in points] == pytest.approx([t[at] for t in totals], rel=1e-3)
    assert run.group("attention/entropy/", 0).keys() == {"blocks.0.attention", "blocks.1.attention"}
    assert [step for step, _ in run.scalars["learning_rate/0"]] == list(range(steps))
    assert "gradients/norm/head.weight" in run.scalars
    assert not [tag for tag in run.scalars if "module" in tag or "network" in tag]


def loader():
    return DataLoader(TensorDataset(*samples()), batch_size=4)


@pytest.mark.parametrize("parts", [1, 2])
def test_hugging_face(parts, tmp_path):
    x, y = samples()
    model = network()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=parts,
        num_train_epochs=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.05,
        eval_strategy="epoch",
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(data)

    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    trainer = InOrder(model=model, args=arguments, train_dataset=data, eval_dataset=data[:8])
    with attach(model, tmp_path / "run", every=1, on_error="raise"):
        trainer.train()
    run = read(tmp_path / "run")
    assert_like_a_plain_loop(run, 6 // parts, parts, 0.05)
    assert len(run.scalars["val/attention/mean_entropy"]) == 1


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = network()

    def training_step(self, batch, index):
        return self.network(*batch)["loss"]

    def validation_step(self, batch, index):
        self.log("val_loss", self.network(*batch)["loss"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*(num_workers|treespec|litlogger|isinstance)")
@pytest.mark.parametrize("parts", [1, 2])
def test_lightning(parts, tmp_path):
    module = Module()
    logger = lightning.loggers.TensorBoardLogger(tmp_path, name="", version="run")
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        accumulate_grad_batches=parts,
        gradient_clip_val=0.05,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with attach(module.network, trainer.logger.experiment, every=1, on_error="raise"):
        trainer.fit(module, loader(), loader())
    logger.experiment.close()
    run = read(tmp_path)
    assert_like_a_plain_loop(run, 6 // parts, parts, 0.05)
    points = run.scalars["val/attention/mean_entropy"]
    assert len(points) == len({step for step, _ in points}) >= 1


@pytest.mark.filterwarnings("ignore:.*(num_workers|treespec|litlogger|isinstance)")
def test_a_lightning_module_whose_forward_never_runs_is_said(tmp_path):
    module = Module()
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    handle = attach(module, tmp_path, every=1)
    with pytest.warns(RuntimeWarning, match="forward of the attached module did not run"):
        trainer.fit(module, loader())
    handle.detach()
    run = read(tmp_path)
    totals = expected(2, 1, None)
    for tag, at in (("gradients/total_norm_before_clip", 0), ("gradients/total_norm", 1)):
        assert [v for _, v in run.scalars[tag]] == pytest.approx([t[at] for t in totals], rel=1e-3)


@pytest.mark.parametrize("parts", [1, 2])
def test_accelerate(parts, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=parts)
    model = network()
    handle = attach(model, tmp_path, every=1, on_error="raise")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer, data = accelerator.prepare(model, optimizer, loader())
    for x, y in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(x, y)["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
    handle.detach()
    assert_like_a_plain_loop(read(tmp_path), 6 // parts, parts, 0.05)


@pytest.mark.parametrize("parts", [1, 2])
def test_ignite(parts, tmp_path):
    model = network()
    trainer: Engine = create_supervised_trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        loss_fn=lambda output, y: F.cross_entropy(output["logits"], y),
        gradient_accumulation_steps=parts,
    )
    with attach(model, tmp_path, every=1, on_error="raise"):
        trainer.run(loader(), max_epochs=1)
    assert_like_a_plain_loop(read(tmp_path), 6 // parts, parts, None)
