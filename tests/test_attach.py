import concurrent.futures
import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import unittest.mock
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import optimizer as torch_optimizer

import bthooks
from bthooks import attach

from .conftest import DEADLINE, read
from .models import Transformer, batch, entropy


def train(model, optimizer, steps, start=0, micro=1):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        for part in range(micro):
            x, y = batch(step * micro + part)
            (F.cross_entropy(model(x)["logits"], y) / micro).backward()
        optimizer.step()


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def traces(model):
    """Where something of ours could be: hooks of every module, of torch, modes."""
    hooks = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if name.endswith(("_hooks", "_with_kwargs", "_always_called")) and value
    ]
    hooks += [p._backward_hooks for p in model.parameters() if p._backward_hooks]
    hooks += [
        p._post_accumulate_grad_hooks
        for p in model.parameters()
        if getattr(p, "_post_accumulate_grad_hooks", None)
    ]
    hooks += list(torch_optimizer._global_optimizer_post_hooks.values())
    hooks += list(torch_optimizer._global_optimizer_pre_hooks.values())
    return hooks, torch._C._len_torch_dispatch_stack()


def test_a_plain_loop_is_logged_truly(tmp_path, backend):
    model = Transformer()
    reference = copy.deepcopy(model)
    optimizer, again = sgd(model), sgd(reference)
    with attach(model, tmp_path, backend=backend, every=2, histograms_every=4) as handle:
        torch.manual_seed(1)
        train(model, optimizer, 5)
        assert handle.step == 5
    run = read(tmp_path)
    assert run.files == 1
    inputs = {}
    for block in reference.blocks:
        block.attention.register_forward_pre_hook(
            lambda module, args: inputs.__setitem__(module, args[0])
        )
    torch.manual_seed(1)
    for step in range(5):
        x, y = batch(step)
        output = reference(x)
        again.zero_grad()
        F.cross_entropy(output["logits"], y).backward()
        truth = {name: p.grad.double().norm().item() for name, p in reference.named_parameters()}
        if step % 2 == 0:
            entropies = {
                f"blocks.{i}.attention": entropy(
                    block.attention.probabilities(inputs[block.attention])
                )
                for i, block in enumerate(reference.blocks)
            }
            assert run.group("attention/entropy/", step) == pytest.approx(entropies, abs=1e-4)
            assert run.value("attention/mean_entropy", step) == pytest.approx(
                sum(entropies.values()) / 2, abs=1e-4
            )
            assert run.group("gradients/norm/", step) == pytest.approx(truth, rel=1e-5)
            total = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
            assert run.value("gradients/total_norm", step) == pytest.approx(total.item(), rel=1e-5)
            own = [truth["blocks.0.norm.weight"], truth["blocks.0.norm.bias"]]
            assert run.value("gradients/layer_mean/blocks.0.norm", step) == pytest.approx(
                sum(own) / 2, rel=1e-5
            )
            assert run.value("learning_rate/0", step) == pytest.approx(0.1)
            for kind in ("epistemic", "aleatoric"):
                assert run.value(f"uncertainty/{kind}", step) == pytest.approx(
                    output[kind].mean().item(), rel=1e-5
                )
        again.step()
    assert {s for points in run.scalars.values() for s, _ in points} == {0, 2, 4}
    for tag in (
        "parameters/head.weight",
        "gradients/distribution/head.weight",
        "uncertainty/distribution/epistemic",
    ):
        assert [point[0] for point in run.histograms[tag]] == [0, 4], tag
    assert not any(tag.startswith("val/") for tag in run.scalars)


def test_what_is_read_back_is_the_same_on_both_backends(tmp_path):
    runs = []
    for backend in ("torch", "tensorboardX"):
        torch.manual_seed(0)
        model = Transformer()
        with attach(model, tmp_path / backend, backend=backend, every=1, histograms_every=1):
            train(model, sgd(model), 3)
        runs.append(read(tmp_path / backend))
    assert runs[0] == runs[1]
    assert len(runs[0].scalars) > 50
    assert len(runs[0].histograms) > 40


def test_micro_batches_are_one_point_and_merged(tmp_path):
    model = Transformer()
    model.blocks[0].drop.p = model.blocks[1].drop.p = 0.0
    x = torch.cat([batch(part)[0] for part in range(3)])
    whole = copy.deepcopy(model)
    with attach(whole, tmp_path / "whole", every=1):
        whole(x)["logits"].sum().backward()
        sgd(whole).step()
    with attach(model, tmp_path / "parts", every=1):
        for part in x.split(4):
            model(part)["logits"].sum().backward()
        sgd(model).step()
    whole, parts = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert parts.scalars.keys() == whole.scalars.keys()
    for tag in whole.scalars:
        assert parts.value(tag, 0) == pytest.approx(whole.value(tag, 0), rel=1e-4, abs=1e-6), tag
    drawn = "uncertainty/distribution/epistemic"
    assert sum(parts.histograms[drawn][0][1].bucket) == 12


def test_scaler_and_clipping_show_what_was_applied(tmp_path):
    model = Transformer()
    plain = copy.deepcopy(model)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with attach(model, tmp_path, every=1):
        torch.manual_seed(5)
        for part in range(2):
            scaler.scale(
                F.cross_entropy(model(batch(part)[0])["logits"], batch(part)[1])
            ).backward()
        scaler.unscale_(optimizer)
        before = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    torch.manual_seed(5)
    for part in range(2):
        F.cross_entropy(plain(batch(part)[0])["logits"], batch(part)[1]).backward()
    assert nn.utils.clip_grad_norm_(plain.parameters(), 0.1) == pytest.approx(
        before.item(), rel=1e-4
    )
    run = read(tmp_path)
    assert before > 0.2
    assert run.value("gradients/total_norm", 0) == pytest.approx(0.1, rel=1e-3)
    truth = {name: p.grad.norm().item() for name, p in plain.named_parameters()}
    assert run.group("gradients/norm/", 0) == pytest.approx(truth, rel=1e-3, abs=1e-7)


def test_two_optimizers_side_by_side_are_one_step(tmp_path):
    model = nn.ModuleDict({"d": nn.Linear(3, 3), "g": nn.Linear(3, 3)})
    model.forward = lambda x: model["g"](model["d"](x))
    d, g = sgd(model["d"], 0.1), sgd(model["g"], 0.2)
    other = sgd(nn.Linear(2, 2))
    with attach(model, tmp_path, every=1) as handle:
        for _ in range(3):
            for optimizer in (d, g):
                model(torch.ones(2, 3)).sum().backward()
                optimizer.step()
                other.step()
        assert handle.step == 3
    run = read(tmp_path)
    assert [s for s, _ in run.scalars["gradients/total_norm"]] == [0, 1, 2]
    names = {"d.weight", "d.bias", "g.weight", "g.bias"}
    assert run.group("gradients/norm/", 1).keys() == names
    assert run.value("learning_rate/0", 2) == pytest.approx(0.1)
    assert run.value("learning_rate/1/0", 2) == pytest.approx(0.2)


def test_eval_stands_apart_and_a_validation_pass_is_one_point(tmp_path):
    model = Transformer()
    optimizer = sgd(model)
    with attach(model, tmp_path, every=3) as handle:
        model.eval()
        for seed in range(2):  # a sanity check before training
            model(batch(seed)[0])
        for epoch in range(2):
            model.train()
            train(model, optimizer, 4, start=4 * epoch)
            model.eval()
            with torch.no_grad():
                for seed in range(3):
                    model(batch(100 + seed)[0])
        assert handle.step == 8
    run = read(tmp_path)
    assert [s for s, _ in run.scalars["val/attention/entropy/blocks.0.attention"]] == [0, 3, 7]
    assert [s for s, _ in run.scalars["val/uncertainty/epistemic"]] == [0, 3, 7]
    assert [s for s, _ in run.scalars["attention/entropy/blocks.0.attention"]] == [0, 3, 6]


def test_inference_without_an_optimizer_is_a_step_each(tmp_path):
    model = Transformer().eval()
    with attach(model, tmp_path, every=2) as handle, torch.inference_mode():
        for seed in range(5):
            assert handle.step == seed
            model(batch(seed)[0])
    assert [s for s, _ in read(tmp_path).scalars["val/attention/mean_entropy"]] == [0, 2, 4]


def test_own_optimizers_call_advance_and_are_told_to(tmp_path):
    model = Transformer()

    def descend_often(times, after=lambda: None):
        for _ in range(times):
            F.cross_entropy(model(batch(0)[0])["logits"], batch(0)[1]).backward()
            for p in model.parameters():
                p.data.sub_(0.1 * p.grad)
            after()
            model.zero_grad()

    with attach(model, tmp_path / "told", every=1) as handle:
        with pytest.warns(RuntimeWarning, match=r"call handle\.advance\(\)"):
            descend_often(4)
        assert "advance" in str(handle.report())
    with attach(model, tmp_path / "done", every=1) as handle:
        descend_often(3, after=handle.advance)
    assert [s for s, _ in read(tmp_path / "done").scalars["gradients/total_norm"]] == [0, 1, 2]


def test_a_closure_that_is_called_several_times_is_one_step(tmp_path):
    model = Transformer()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    x, y = batch(0)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x)["logits"], y)
        loss.backward()
        return loss

    with attach(model, tmp_path, every=1, on_error="raise"):
        for _ in range(2):
            optimizer.step(closure)
    run = read(tmp_path)
    assert [s for s, _ in run.scalars["gradients/total_norm"]] == [0, 1]
    assert [s for s, _ in run.scalars["attention/mean_entropy"]] == [0, 1]


def test_lazy_parameters_become_known(tmp_path):
    model = nn.Sequential(nn.LazyLinear(16), Transformer())
    with attach(model, tmp_path, every=1, on_error="raise"):
        model(torch.randn(2, 3, 5))["logits"].sum().backward()
        sgd(model).step()
    run = read(tmp_path)
    assert run.group("attention/entropy/", 0).keys() == {
        "1.blocks.0.attention",
        "1.blocks.1.attention",
    }
    assert "gradients/norm/0.weight" in run.scalars


@pytest.mark.parametrize(
    ("every", "step", "expected"),
    [(3, 0, [0, 3, 6]), (3, 5, [5, 6, 9]), (lambda step: step in {2, 5}, 0, [0, 2, 5])],
)
def test_cadence(tmp_path, every, step, expected):
    model = nn.Linear(16, 3)
    with attach(model, tmp_path, every=every, step=step) as handle:
        optimizer = sgd(model)
        for _ in range(7):
            model(torch.ones(1, 16)).sum().backward()
            optimizer.step()
        assert handle.step == step + 7
    run = read(tmp_path)
    assert [s for s, _ in run.scalars["gradients/total_norm"]] == expected
    assert [point[0] for point in run.histograms["parameters/weight"]] == [step]


def test_activations_and_update_ratios_on_request(tmp_path):
    model = Transformer()
    kinds = ("activations", "updates")
    with attach(model, tmp_path, capture=kinds, include=["blocks.*.mlp", "head*"]) as handle:
        before = copy.deepcopy(model)
        train(model, sgd(model), 1)
    run = read(tmp_path)
    assert run.histograms.keys() == {
        "activations/blocks.0.mlp",
        "activations/blocks.1.mlp",
        "activations/head",
    }
    for name in ("weight", "bias"):
        old, new = getattr(before.head, name).double(), getattr(model.head, name).double()
        assert run.value(f"gradients/update_ratio/head.{name}", 0) == pytest.approx(
            ((new - old).norm() / old.norm()).item(), rel=1e-4
        )
    assert run.scalars.keys() == {
        "gradients/update_ratio/head.weight",
        "gradients/update_ratio/head.bias",
        "health/nonfinite",
        "health/dead_activations",
    }
    assert set(handle.report().captured) == set(kinds)


def test_forwards_are_written_at_the_cadence_of_their_kind(tmp_path):
    """Whether one is of a step that is due is known at that step only."""
    model = Transformer()
    kinds = ("activations", "attention", "uncertainty")
    with attach(model, tmp_path, capture=kinds, every=3, histograms_every=2):
        train(model, sgd(model), 8)
    run = read(tmp_path)
    steps = {tag: [step for step, _ in points] for tag, points in run.scalars.items()}
    assert steps["attention/mean_entropy"] == steps["uncertainty/epistemic"] == [0, 3, 6]
    for tag in "activations/head", "uncertainty/distribution/epistemic":
        assert [step for step, *_ in run.histograms[tag]] == [0, 2, 4, 6]


def test_include_and_prefix(tmp_path):
    model = Transformer()
    with attach(model, tmp_path, include="blocks.1.*", prefix="student", every=1) as handle:
        train(model, sgd(model), 1)
    run = read(tmp_path)
    assert run.group("student/attention/entropy/", 0).keys() == {"blocks.1.attention"}
    assert all(name.startswith("blocks.1.") for name in run.group("student/gradients/norm/", 0))
    assert all(tag.startswith("student/") for tag in [*run.scalars, *run.histograms])
    assert handle.report().captured["attention"] == ("blocks.1.attention",)


def test_between_logging_steps_nothing_is_on_submodules(tmp_path):
    model = Transformer()
    seen = []
    with attach(
        model,
        tmp_path,
        capture=("activations", "attention", "histograms"),
        every=3,
        histograms_every=3,
    ):
        optimizer = sgd(model)
        for step in range(4):
            inside = model.blocks[0].mlp
            inside.forward = lambda x, inside=inside: (
                seen.append((len(inside._forward_hooks), torch._C._len_torch_dispatch_stack())),
                nn.Sequential.forward(inside, x),
            )[1]
            train(model, optimizer, 1, start=step)
            del inside.forward
            for module in model.modules():
                if module is not model:
                    assert not module._forward_hooks
                    assert not module._forward_pre_hooks
    assert seen == [(2, 1), (0, 0), (0, 0), (2, 1)]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_parts_take_no_hook_and_are_no_harm(tmp_path):
    scripted = torch.jit.script(nn.Linear(4, 4)), torch.jit.trace(nn.Linear(4, 4), torch.ones(1, 4))
    model = nn.Sequential(nn.Linear(4, 4), *scripted)
    with attach(model, tmp_path, capture=["activations"], every=1, on_error="raise"):
        model(torch.ones(1, 4)).sum().backward()
        sgd(model).step()
    assert list(read(tmp_path).histograms) == ["activations/0"]


@pytest.mark.parametrize("end", ["detach", "twice", "exception", "interrupt"])
def test_detach_leaves_no_trace(tmp_path, end):
    model = Transformer()
    before = traces(model)
    optimizer = sgd(model)
    handle = attach(
        model,
        tmp_path,
        capture=(*bthooks.capture.wanted.KINDS, *bthooks.capture.wanted.ON_REQUEST),
        every=1,
        histograms_every=1,
    )
    train(model, optimizer, 2)
    if end in ("exception", "interrupt"):
        error = RuntimeError if end == "exception" else KeyboardInterrupt

        def fail(x):
            raise error

        model.head.forward = fail
        with pytest.raises(error):
            train(model, optimizer, 1)
        del model.head.forward
        train(model, optimizer, 1)
        assert handle.step == 3
    handle.detach()
    if end == "twice":
        handle.detach()
    assert traces(model) == before == ([], 0)
    train(model, optimizer, 1)
    steps = [s for s, _ in read(tmp_path).scalars["attention/mean_entropy"]]
    assert steps == list(range(3 if end in ("exception", "interrupt") else 2))


def test_a_forward_that_raised_is_not_counted(tmp_path):
    model = Transformer()
    optimizer = sgd(model)
    with attach(model, tmp_path / "a", every=1):
        head, model.head = model.head, None
        with pytest.raises(TypeError):
            model(batch(9)[0])
        model.head = head
        torch.manual_seed(0)
        train(model, optimizer, 1)
    reference = read(tmp_path / "a")
    assert sum(point[0] == 0 for point in reference.scalars["attention/mean_entropy"]) == 1


def test_copies_are_silent_and_load_without_bthooks(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    handle = attach(model, tmp_path / "run", every=1)
    torch.save(model, tmp_path / "model.pt")
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), averaged):
        assert not any(p._post_accumulate_grad_hooks for p in other.parameters())
        other(torch.ones(1, 4)).sum().backward()
        sgd(other).step()
    assert handle.step == 0
    code = (
        "import sys; sys.modules['bthooks'] = None; import torch; "
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); "
        "model(torch.ones(1, 4)).sum().backward(); torch.jit.script(model)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    handle.detach()


def test_a_copy_made_within_an_observed_forward_is_silent(tmp_path):
    model, copies = Transformer(), []
    model.blocks[1].register_forward_pre_hook(
        lambda module, args: copies.append(copy.deepcopy(model)) if not copies else None
    )
    with attach(model, tmp_path, capture=("attention", "activations"), histograms_every=1):
        model(batch(0)[0])["logits"].sum().backward()
        sgd(model).step()
    assert any(module._forward_hooks for module in copies[0].blocks.modules())
    x, _ = batch(1)
    seen = copies[0].eval()(x)["logits"]
    pickle.dumps(copies[0].head)
    assert torch.equal(seen, copies[0](x)["logits"])
    assert [s for s, _ in read(tmp_path).scalars["attention/mean_entropy"]] == [0]


def test_an_include_that_raises_is_said_and_training_goes_on(tmp_path):
    model = Transformer()
    optimizer = sgd(model)
    handle = attach(model, tmp_path, every=1, include=lambda name: int(name) > 0)
    with pytest.warns(RuntimeWarning, match="ValueError: invalid literal"):
        train(model, optimizer, 3)
    handle.detach()
    assert handle.step == 3


def test_another_thread_can_end_an_attachment_within_a_forward(tmp_path):
    model, inside, ended = Transformer().eval(), threading.Event(), threading.Event()
    handle = attach(model, tmp_path, every=1)
    model.head.register_forward_pre_hook(lambda *_: (inside.set(), ended.wait(30), None)[-1])

    def infer():
        model(batch(0)[0])
        return torch._C._len_torch_dispatch_stack()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        depth = pool.submit(infer)
        inside.wait(30)
        handle.detach()
        ended.set()
        assert depth.result() == 0
    model.head._forward_pre_hooks.clear()
    assert traces(model) == ([], 0)


def test_a_flush_between_two_optimizers_loses_nothing(tmp_path):
    model = Transformer()
    parts = [sgd(model.blocks), sgd(model.head)]
    with attach(model, tmp_path, every=1) as handle:
        for _ in range(2):
            for optimizer in parts:
                model(batch(0)[0])["logits"].sum().backward()
                optimizer.step()
                handle.flush()
    run = read(tmp_path)
    for name in ("blocks.0.norm.weight", "head.weight"):
        assert [s for s, _ in run.scalars[f"gradients/norm/{name}"]] == [0, 1]


def test_a_root_that_calls_itself_in_eval_is_one_forward(tmp_path):
    class Teacher(Transformer):
        def forward(self, x):
            if self.training:
                self.eval()
                with torch.no_grad():
                    self(x)
                self.train()
            return super().forward(x)

    model = Teacher()
    optimizer = sgd(model)
    with attach(model, tmp_path, every=1):
        for step in range(3):
            train(model, optimizer, 1, start=step)
            model.eval()
            model(batch(0)[0])
            model.train()
    run = read(tmp_path)
    for tag in ("attention/entropy/blocks.0.attention", "attention/entropy/blocks.0.attention/1"):
        assert [s for s, _ in run.scalars[tag]] == [0, 1, 2]


def test_inference_resumes_where_it_was():
    model = Transformer().eval()
    with attach(model, None, every=1) as handle:
        for seed in range(3):
            model(batch(seed)[0])
        state = handle.state_dict()
    with attach(model, None, every=1) as handle:
        handle.load_state_dict(state)
        assert handle.step == 3


def test_a_forked_child_ends_without_us(tmp_path):
    code = f"""
import os, sys, bthooks
from torch import nn
writer = bthooks.make_writer({str(tmp_path)!r}, "run")
bthooks.attach(nn.Linear(2, 2), writer)
child = os.fork()
if child == 0:
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=DEADLINE)


def test_a_model_that_overrides_parameters_is_known(tmp_path):
    class Pair(Transformer):
        def parameters(self, recurse=True):
            return [list(self.blocks.parameters()), list(self.head.parameters())]

    model = Pair()
    optimizer = torch.optim.SGD([p for _, p in model.named_parameters()], lr=0.1)
    with attach(model, tmp_path, every=1) as handle:
        train(model, optimizer, 2)
    assert handle.step == 2
    assert [s for s, _ in read(tmp_path).scalars["gradients/total_norm"]] == [0, 1]


def test_a_mock_is_a_writer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = unittest.mock.MagicMock()
    model = Transformer()
    with attach(model, writer, every=1):
        train(model, sgd(model), 1)
    assert "gradients/total_norm" in [call.args[0] for call in writer.add_scalar.call_args_list]
    assert not list(tmp_path.iterdir())


def test_several_threads_may_run_one_model(tmp_path):
    model = Transformer().eval()

    def infer():
        with torch.no_grad():
            for seed in range(10):
                model(batch(seed)[0])
        assert torch._C._len_torch_dispatch_stack() == 0

    with attach(model, tmp_path, every=1, on_error="raise") as handle:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(infer) for _ in range(4)]:
                done.result()
        assert handle.step > 0
    steps = [s for s, _ in read(tmp_path).scalars["val/attention/mean_entropy"]]
    assert steps == list(range(len(steps)))


def test_a_dropped_handle_stays_attached_and_a_dropped_model_does_not(tmp_path):
    model = Transformer()
    attach(model, tmp_path, every=1)
    gc.collect()
    train(model, sgd(model), 2)
    del model
    gc.collect()
    assert not torch_optimizer._global_optimizer_post_hooks
    assert [s for s, _ in read(tmp_path).scalars["gradients/total_norm"]] == [0, 1]


def test_attaching_again_replaces(tmp_path):
    model = Transformer()
    first = attach(model, tmp_path / "run", every=1)
    train(model, sgd(model), 1)
    with pytest.warns(UserWarning, match="replaces the former"):
        second = attach(model, tmp_path / "run", every=1)
    assert len(bthooks.capture.steps._listeners) == 1
    other = attach(model, tmp_path / "other", every=1)
    assert len(bthooks.capture.steps._listeners) == 2
    second.detach()
    other.detach()
    first.detach()


def test_two_models_on_one_writer_need_prefixes(tmp_path):
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    with bthooks.make_writer(tmp_path, "run") as writer, attach(first, writer):
        with pytest.warns(UserWarning, match="points mix in the same tags"):
            attach(second, writer).detach()
        attach(second, writer, prefix="second").detach()


@pytest.mark.parametrize("updates", [True, False])
def test_detach_from_inside_a_step(updates, tmp_path):
    """torch walks over its hooks then: nothing may be taken from them before it is done."""
    model = nn.Linear(2, 2)
    optimizer = sgd(model)
    capture = ["gradients", "updates"] if updates else ["gradients"]
    handles = []

    def every(step):
        if step == 2:
            handles[0].detach()
        return True

    handles.append(attach(model, tmp_path / "a", every=every, capture=capture))
    with attach(model, tmp_path / "b", every=1, on_error="raise"):
        for _ in range(4):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    # The cadence of step 2 was asked for before step 1 was measured.
    assert [s for s, _ in read(tmp_path / "a").scalars["gradients/total_norm"]] == [0]
    assert [s for s, _ in read(tmp_path / "b").scalars["gradients/total_norm"]] == [0, 1, 2, 3]
    attach(model, None).detach()
    assert traces(model) == ([], 0)


def test_detach_from_inside_a_forward_of_inference():
    model, calls = nn.Linear(2, 2).eval(), []

    def every(step):
        calls.append(step)
        return len(calls) < 3 or handle.detach() or True

    handle = attach(model, None, every=every)
    for _ in range(5):
        model(torch.ones(1, 2))
    assert traces(model) == ([], 0)


def test_an_optimizer_that_replaces_one_that_lives_on(tmp_path):
    model = nn.Linear(2, 2)
    first, second = sgd(model, 0.1), torch.optim.Adam(model.parameters(), 0.2)
    with attach(model, tmp_path, every=1, on_error="raise") as handle:
        for optimizer in (first, first, second, second):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        assert handle.step == 4
    points = read(tmp_path).scalars["gradients/total_norm"]
    assert [step for step, _ in points] == [0, 1, 2, 3]


def test_weights_that_are_loaded_before_training_are_no_step(tmp_path):
    model = Transformer()
    kept = {name: value + 1 for name, value in model.state_dict().items()}
    with attach(model, tmp_path, every=1, on_error="raise"):
        model(batch(0)[0])
        model.load_state_dict(kept)
        train(model, sgd(model), 2)
    assert [s for s, _ in read(tmp_path).scalars["gradients/total_norm"]] == [0, 1]


def test_a_property_of_the_output_is_left_alone(tmp_path):
    class Output:
        @property
        def epistemic(self):
            return torch.rand(3)

        def __init__(self):
            self.aleatoric = torch.ones(3)

    model = nn.Linear(2, 2)
    model.forward = lambda x: Output()
    with attach(model, tmp_path, every=1):
        state = torch.get_rng_state()
        model(torch.ones(1, 2))
        assert torch.equal(torch.get_rng_state(), state)
    assert read(tmp_path).group("uncertainty/", 0) == {"aleatoric": 1.0}


def test_one_odd_tensor_does_not_lose_the_others(tmp_path):
    model = nn.ModuleDict({"good": nn.Linear(2, 2), "odd": nn.Linear(2, 2, device="meta")})
    model.forward = lambda x: model["good"](x)
    optimizer = sgd(model["good"])
    model["odd"].weight.grad = torch.empty(2, 2, device="meta")
    optimizer.add_param_group({"params": [model["odd"].bias]})
    model["odd"].bias.grad = torch.empty(2, device="meta")
    handle = attach(model, tmp_path, every=1)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.warns(RuntimeWarning, match="not measured, ValueError: a tensor on the meta") as w:
        optimizer.step()
    handle.detach()
    assert {"gradient of odd.bias", "histogram of odd.weight"} <= handle.report().missed.keys()
    assert len({str(warning.message) for warning in w}) == len(w)
    run = read(tmp_path)
    assert run.group("gradients/norm/", 0).keys() == {"good.weight", "good.bias"}
    assert "parameters/good.weight" in run.histograms


def test_stale_gradients_of_another_optimizer_are_not_drawn(tmp_path):
    model = nn.ModuleDict({"d": nn.Linear(2, 2), "g": nn.Linear(2, 2)})
    model.forward = lambda x: model["g"](model["d"](x))
    d, g = sgd(model["d"]), sgd(model["g"])
    with attach(model, tmp_path, every=1, histograms_every=1, on_error="raise"):
        for step in range(4):  # the second player steps in every other round
            for optimizer in (d, g) if step % 2 == 0 else (d,):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
    run = read(tmp_path)
    drawn = {name: run.histograms[f"gradients/distribution/{name}.weight"] for name in "dg"}
    assert {name: [p[0] for p in points] for name, points in drawn.items()} == {
        "d": [0, 1, 2, 3],
        "g": [0, 2],
    }


def test_flush_in_the_middle_of_a_step_gives_no_double_point(tmp_path):
    model = Transformer()
    with attach(model, tmp_path, every=1) as handle:
        optimizer = sgd(model)
        for step in range(2):
            for part in range(2):
                model(batch(part)[0])["logits"].sum().backward()
                handle.flush()
            optimizer.step()
            handle.flush()
            del step
    run = read(tmp_path)  # checks that steps increase
    assert [s for s, _ in run.scalars["gradients/total_norm"]] == [0, 1]
    assert [s for s, _ in run.scalars["attention/mean_entropy"]] == [0, 1]


def test_resume_continues_the_same_charts(tmp_path, backend):
    model = Transformer()
    optimizer = sgd(model)
    with attach(model, tmp_path, backend=backend, every=2) as handle:
        train(model, optimizer, 5)
        state = handle.state_dict()
    resumed = bthooks.make_writer(tmp_path.parent, tmp_path.name, backend=backend, purge_step=5)
    with attach(model, resumed, every=2) as handle:
        handle.load_state_dict(state)
        assert handle.step == 5
        train(model, optimizer, 4)
    resumed.close()
    run = read(tmp_path)
    assert [s for s, _ in run.scalars["gradients/total_norm"]] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("backend", ["torch", "tensorboardX"])
def test_an_exit_without_a_word_loses_nothing(tmp_path, backend):
    code = f"""
import bthooks, torch
from torch import nn
model = nn.Linear(4, 4)
writer = bthooks.make_writer({str(tmp_path)!r}, "run", backend={backend!r})
bthooks.attach(model, writer, every=1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(30):
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    run = read(tmp_path / "run")
    assert [s for s, _ in run.scalars["gradients/total_norm"]] == list(range(30))


class Double:
    """A writer that is neither backend's."""

    def __init__(self):
        self.scalars, self.histograms, self.calls = [], [], []

    def __getattribute__(self, name):
        if name.startswith("add_") or name in ("flush", "close"):
            return lambda *args, **kwargs: (
                self.calls.append(name),
                getattr(type(self), name)(self, *args, **kwargs),
            )[1]
        return super().__getattribute__(name)

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def add_histogram_raw(self, tag, *, global_step, **raw):
        self.histograms.append((tag, global_step, raw))

    def flush(self):
        pass

    def close(self):
        pass


def test_any_writer_will_do_and_is_not_touched_by_attach_nor_closed():
    model, double = Transformer(), Double()
    with attach(model, double, every=1):
        assert double.calls == []
        train(model, sgd(model), 2)
    assert ("gradients/total_norm", 1) in [(tag, step) for tag, _, step in double.scalars]
    assert "parameters/head.weight" in [tag for tag, *_ in double.histograms]
    assert "close" not in double.calls


def test_nothing_is_written_without_a_writer():
    model = Transformer()
    with attach(model, None, every=1) as handle:
        train(model, sgd(model), 2)
    assert handle.writer is None
    assert handle.report().captured["attention"] == ("blocks.0.attention", "blocks.1.attention")


def test_what_fails_in_a_step_is_said_once_and_the_step_goes_on():
    class Broken(Double):
        def add_scalar(self, tag, value, step):
            raise OSError("no space left on device")

    model = Transformer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with attach(model, Broken(), every=1) as handle:
            train(model, sgd(model), 5)
    assert handle.step == 5
    assert len([w for w in caught if "no space left" in str(w.message)]) == 1
    assert "no space left" in str(handle.report())
    with (
        pytest.raises(OSError, match="no space"),
        attach(model, Broken(), every=1, on_error="raise"),
    ):
        train(model, sgd(model), 2)


def test_a_warning_turned_into_an_error_does_not_stop_training():
    model = nn.Linear(16, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(model, None, capture=["attention"], every=1) as handle:
            optimizer = sgd(model)
            for _ in range(3):
                model(torch.ones(1, 16)).sum().backward()
                optimizer.step()
    assert "attention" in handle.report().missed


def test_absent_kinds_are_a_warning_only_where_they_were_named():
    model = nn.Linear(16, 3)
    optimizer = sgd(model)

    def steps():
        for _ in range(3):
            model(torch.ones(1, 16)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(model, None, every=1) as handle:
            steps()
    assert handle.report().missed.keys() == {"attention", "uncertainty"}
    with (
        pytest.warns(RuntimeWarning, match="attention: no attention was recognised") as caught,
        attach(model, None, capture=("attention", "gradients"), every=1),
    ):
        steps()
    assert len(caught) == 1


def test_an_include_that_selects_nothing_is_said():
    model = Transformer()
    with (
        pytest.warns(RuntimeWarning, match="include: it selects no module path"),
        attach(model, None, include="encoder.*", every=1),
    ):
        train(model, sgd(model), 2)


def test_a_forward_that_never_runs_is_said():
    inner = Transformer()
    model = nn.ModuleDict({"inner": inner})
    optimizer = sgd(model)
    with (
        pytest.warns(RuntimeWarning, match="attach to the module that the loop calls"),
        attach(model, None, every=1),
    ):
        train(inner, optimizer, 3)


def test_wrapper_names_are_not_in_tags(tmp_path):
    model = nn.Sequential()
    model.add_module("module", Transformer())
    with attach(model, tmp_path, every=1):
        train(model, sgd(model), 1)
    run = read(tmp_path)
    assert "attention/entropy/blocks.0.attention" in run.scalars
    assert "gradients/norm/head.weight" in run.scalars


def test_parameters_that_come_after_attach_are_seen(tmp_path):
    model = Transformer()
    with attach(model, tmp_path, every=1):
        train(model, sgd(model), 1)
        model.head = nn.Sequential(model.head, nn.Linear(3, 3))
        train(model, sgd(model), 1)
    run = read(tmp_path)
    assert [s for s, _ in run.scalars["gradients/norm/head.weight"]] == [0]
    assert [s for s, _ in run.scalars["gradients/norm/head.1.weight"]] == [1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "torch.nn.Module, got int"),
        ({"model": torch.jit.script(nn.Linear(2, 2))}, TypeError, "attach to it unscripted"),
        ({"writer": 3}, TypeError, "SummaryWriter's methods, a path or None, got int"),
        ({"backend": "wandb"}, ValueError, 'expected "torch" or "tensorboardX"'),
        ({"capture": "attention"}, TypeError, "sequence of names"),
        ({"capture": ["attentions"]}, ValueError, "'attentions'; known: .*'attention'"),
        ({"every": 0}, ValueError, "every=0: expected a number of steps"),
        ({"histograms_every": 2.5}, ValueError, "histograms_every=2.5"),
        ({"attention_rows": 0}, ValueError, "attention_rows=0"),
        ({"step": -1}, ValueError, "step=-1"),
        ({"step": True}, ValueError, "step=True: expected a whole number from 0"),
        ({"step": torch.tensor(1.5)}, ValueError, r"step=tensor\(1.5000\)"),
        ({"prefix": 3}, TypeError, "prefix is a str, got int"),
        ({"on_alert": 3}, TypeError, "a function of an Alert, got int"),
        ({"include": 7}, TypeError, "a glob such as"),
        ({"on_error": "ignore"}, ValueError, '"warn" or "raise"'),
    ],
)
def test_bad_arguments_are_refused_at_the_call(arguments, error, message):
    model = nn.Linear(2, 2)
    arguments = {"model": model, "writer": None} | arguments
    with pytest.raises(error, match=message):
        attach(**arguments)
    assert traces(model) == ([], 0)


def test_a_state_that_is_none_is_refused():
    handle = attach(nn.Linear(2, 2), None)
    with pytest.raises(ValueError, match="keys"):
        handle.load_state_dict({"epoch": 3})
    handle.detach()


def test_state_is_plain_data():
    handle = attach(nn.Linear(2, 2), None)
    file = io.BytesIO()
    torch.save(handle.state_dict(), file)
    file.seek(0)
    handle.load_state_dict(torch.load(file, weights_only=True))
    handle.detach()
