"""Training on a pretended device.

No operation mixes devices, no step waits without need, the numbers are equal.
"""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from helpers import layouts
from helpers.faults import with_bad_steps
from helpers.models import build_two_tower, tiny_config
from helpers.pretended_device import Pretended, Waits, WrongDevice, as_there, on_host, pretended_cuda
from helpers.trainers import built_trainer, restore, save
from megatron_twotower.checkpoint import files
from megatron_twotower.common import device
from megatron_twotower.config.context_split import COMPLETE, stretches
from megatron_twotower.mcore.releases import RELEASE
from megatron_twotower.ops import context_parallel
from megatron_twotower.train import loop
from megatron_twotower.train import run as train_run
from megatron_twotower.train.losses import masked_diffusion_loss
from megatron_twotower.train.noise import corrupt
from megatron_twotower.train.progress import TrainingProgress
from megatron_twotower.types import Batch


def test_an_operation_that_mixes_devices_fails():
    with pretended_cuda():
        x, stranger = torch.ones(3, device="cuda"), torch.ones(3)
        with pytest.raises(WrongDevice, match="same device"):
            x + stranger
        with pytest.raises(WrongDevice, match="same device"):
            torch.cat([x, stranger])
        with pytest.raises(WrongDevice, match="same device"):
            stranger.add_(x)
        with pytest.raises(WrongDevice, match="same device"):
            x.unsqueeze(0) @ torch.tensor(2.0).view(1, 1).expand(3, 1)
        # A GPU accepts numbers of the host in pointwise operations, and indices.
        assert on_host(x * torch.tensor(2.0)).tolist() == [2.0] * 3
        assert on_host(x[torch.tensor([0, 2])]).tolist() == [1.0] * 2
        with pytest.raises(WrongDevice):
            torch.stack([x[0], torch.tensor(1.0)])
        with pytest.raises(TypeError, match="cuda:0"):
            x.numpy()
        own = torch.Generator("cuda").manual_seed(0)
        drawn = torch.empty_like(x).uniform_(generator=own)
        assert torch.equal(on_host(drawn), torch.rand(3, generator=torch.Generator().manual_seed(0)))
        with pytest.raises(WrongDevice, match="generator"):
            x.uniform_(generator=torch.Generator())
        with pytest.raises(WrongDevice, match="generator"):
            torch.rand(3, generator=own)


WAITS = {
    "item": (lambda x: x.sum().item(), "a number"),
    "truth": (lambda x: bool((x > 0).all()), "a number"),
    "list": (lambda x: x.tolist(), "a copy to the host"),
    "cpu": (lambda x: x.cpu(), "a copy to the host"),
    "to": (lambda x: x.to("cpu", torch.float64), "a copy to the host"),
    "into": (lambda x: torch.empty(3).copy_(x), "a copy to the host"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "mask": (lambda x: x[x > 0], "nonzero"),
    "masked write of many": (lambda x: x.index_put_((x > 0,), x.clone()), "nonzero"),
    "where": (lambda x: torch.where(x > 0), "nonzero"),
    "numbers": (lambda x: torch.tensor([1, 2], device="cuda"), "a copy from the host"),
    "indices of the host": (lambda x: x[[0, 1]], "a copy from the host"),
    "patient copy": (lambda x: torch.ones(3).pin_memory().to("cuda"), "a copy from the host"),
    "pageable": (lambda x: torch.ones(3).to("cuda", non_blocking=True), "a copy from pageable memory"),
}
FREE = {
    "pinned": lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
    "there already": lambda x: x.to("cuda"),
    "filled": lambda x: x.masked_fill(x > 0, 2.0),
    "a number under a mask": lambda x: x.__setitem__(x > 0, 2.0),
    "made there": lambda x: torch.arange(3, device=x.device) + torch.zeros_like(x).new_ones(3),
    "a gradient": lambda x: torch.autograd.grad((x.requires_grad_() * 2).sum(), x),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_for_the_device_is_counted(name):
    ask, kind = WAITS[name]
    with pretended_cuda() as waits:
        x = torch.ones(3, device="cuda")
        ask(x)
    assert [wait.kind for wait in waits.found] == [kind]
    assert waits.found[0].where.startswith("test_steps.py:")


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait_is_not_counted(name):
    with pretended_cuda() as waits:
        FREE[name](torch.ones(3, device="cuda"))
    assert waits.found == []


def test_a_product_that_only_a_gpu_sums_in_a_wider_precision():
    left, right = (torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    with pretended_cuda():
        total = torch.ones(4, 4, device="cuda")
        torch.addmm(total, left.to("cuda").t(), right.to("cuda"), out_dtype=torch.float32, out=total)
    assert torch.equal(on_host(total), torch.ones(4, 4).addmm_(left.t().float(), right.float()))


def test_modules_move_and_train_as_on_the_host():
    torch.manual_seed(0)
    module, x = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.SiLU(), torch.nn.Linear(4, 1)), torch.randn(5, 3)
    module(x).sum().backward()
    want = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    with pretended_cuda():
        module.to("cuda")
        assert all(isinstance(p, Pretended) and isinstance(p, torch.nn.Parameter) for p in module.parameters())
        out = module(x.to("cuda"))
        assert out.is_cuda and out.device == torch.device("cuda", 0) and not out.is_meta
        out.sum().backward()
        torch.optim.AdamW(module.parameters(), fused=False, foreach=False).step()
    for parameter, gradient in zip(module.parameters(), want, strict=True):
        assert torch.equal(on_host(parameter.grad), gradient)


# --- training ---


def two_tower_pass(config, groups, documents=None, stretches=COMPLETE):
    """Loss and gradients of a forward and backward pass of two towers."""
    model, _ = build_two_tower(config, groups)
    model.train()
    tokens = torch.randint(4, 48, (2, 16), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, *[torch.arange(2)] * 3, documents=documents)
    noisy = corrupt(batch, config.noise, seed=3, stretches=stretches).to(device.device())
    report = masked_diffusion_loss(model.tower, model(noisy), noisy, config.noise, groups)
    report.total.backward()
    return report, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _gather_twice(out, own, group, async_op):
    """What a rank would get if the other one had the same stretches."""
    out.copy_(torch.cat([own, own]))
    return SimpleNamespace(wait=lambda: None)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("recompute", ["", "ME*-"])
def test_two_towers_forward_and_backward(groups, monkeypatch, recompute, ranks):
    config, more = tiny_config("ME*-M*", recompute_layers=recompute), {}
    if ranks > 1:
        more = {
            "documents": (torch.arange(16, dtype=torch.int32) // 6).repeat(2, 1),
            "stretches": stretches(16, ranks=ranks, rank=0),
        }
        pretended = SimpleNamespace(
            get_world_size=lambda group: ranks, get_rank=lambda group: 0, all_gather_into_tensor=_gather_twice
        )
        monkeypatch.setattr(context_parallel, "dist", pretended)
    with as_there():
        want, gradients = two_tower_pass(config, groups, **more)
    with pretended_cuda() as waits:
        got, there = two_tower_pass(config, groups, **more)
    assert all(tensor.is_cuda for tensor in (*vars(got).values(), *there.values()))
    assert torch.equal(on_host(got.total), want.total) and torch.equal(on_host(got.count), want.count)
    assert there.keys() == gradients.keys()
    for name, gradient in there.items():
        assert torch.equal(on_host(gradient), gradients[name]), name
    # Of this package only the loading of weights waits.
    assert {wait.where.partition(" ")[2] for wait in waits.of("ours")} == {"load.load_weights"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return layouts.write_backbone(tmp_path_factory.mktemp("backbone") / "hf")


def one_step(trainer, step):
    batches = layouts.micro_batches(trainer.config, trainer.groups, step)
    return loop.train_step(trainer.in_phase_of(step * layouts.SEQUENCES), batches)


def two_steps(config, waits):
    """Two steps of training, and a validation.

    Returns their sums, gradient norms, parameters and figures, and what the second step and the
    validation waited for.
    """
    with built_trainer(config) as (trainer, model):
        sums, norms = [], []
        for step in range(2):
            with waits.during() as second:
                result = one_step(trainer, step)
            assert result.taken
            sums.append(result.sums)
            norms.append(result.grad_norm)
        parameters = {name: p.detach() for chunk in model.chunks for name, p in chunk.named_parameters()}
        with waits.during() as validating:
            validation = loop.validate(trainer, layouts.micro_batches(config, trainer.groups, 0))
        return sums, norms, parameters, validation, second, validating


STEPS = [("plain", False)]
SLOW_STEPS = [("ar", True), ("hard", True), ("hard", False), ("bf16", True), ("bf16", False)]


@pytest.mark.parametrize(
    ("kind", "distributed"), [*STEPS, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW_STEPS)]
)
def test_steps_of_training(backbone, kind, distributed):
    """Steps with Megatron's schedule, gradient buffers and optimizers have the numbers of the host.

    This package waits once, for whether the loss is finite, right after Megatron has waited for the
    norm.
    """
    config = layouts.changed(layouts.base(backbone), layouts.RUNS[kind])
    config = layouts.changed(config, {"optimizer": {"distributed": distributed}})
    with as_there():
        sums, norms, parameters, validation, *_ = two_steps(config, Waits())
    with pretended_cuda() as waits:
        *there, second, validating = two_steps(config, waits)
    assert all(torch.equal(on_host(got), want) for got, want in zip(there[0], sums, strict=True))
    assert there[1] == norms and there[3] == validation
    for name, got in there[2].items():
        assert torch.equal(on_host(got), parameters[name]), name
    assert second.counted("ours") == {"a number: optimizer.guarded_step": 1}
    # Megatron waits for the sum of tokens (up to 0.16), for the norm, and in layers of experts for
    # what each micro-batch sends to whom.
    counted = second.counted("megatron")
    assert counted.pop("a number: finalize_model_grads.finalize_model_grads", 0) == (RELEASE == "0.16")
    assert counted.pop("a number: clip_grads.get_grad_norm_fp32") == 1
    assert {place.partition(": ")[2].partition(".")[0] for place in counted} == {"moe_utils", "experts"}
    assert len(second.of("others")) == 0
    load = {} if kind == "ar" else {"a copy to the host: loop._tokens_by_noise": 1}
    assert validating.counted("ours") == {"a copy to the host: loop._figures": 1} | load


# --- non-finite steps, and checkpoints ---


def stored(trainer, model):
    """Copies of the tensors that a checkpoint stores, by key and offset."""
    shards = files.state_dict(train_run.state_of(trainer, model)())
    return {name: shard.data.clone() for name, shard in shards.items() if isinstance(shard, ShardedTensor)}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert torch.equal(on_host(tensor), on_host(want[name])), name


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "distributed"), [(False, True), (True, False)])
def test_a_step_that_is_not_finite_changes_nothing(backbone, monkeypatch, loss, distributed):
    """A gradient that is not finite shows in the norm, for which Megatron has waited.

    This package does not wait.
    """
    config = layouts.changed(layouts.base(backbone), {"optimizer": {"distributed": distributed}})
    with_bad_steps(monkeypatch, {2}, loss=loss)
    with pretended_cuda() as waits, built_trainer(config) as (trainer, model):
        assert one_step(trainer, 0).taken
        before = stored(trainer, model)
        assert any(name.endswith("expert_bias@0") and on_host(tensor).any() for name, tensor in before.items())
        with waits.during() as second:
            assert not one_step(trainer, 1).taken
        assert_same(stored(trainer, model), before)
        assert one_step(trainer, 2).taken
    assert second.counted("ours") == ({"a number: optimizer.guarded_step": 1} if loss else {})
    assert second.counted("megatron")["a number: clip_grads.get_grad_norm_fp32"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "distributed"), [("fp32", False), ("bf16", True)])
def test_a_checkpoint_of_the_device_is_that_of_the_host(backbone, precision, distributed, tmp_path):
    """A checkpoint written on the device is read there and on the host.

    To list its tensors waits for nothing.
    """
    config = layouts.changed(layouts.base(backbone), {"optimizer": {"distributed": distributed}})
    config = layouts.changed(config, {"train": {"precision": precision}})
    with as_there(), built_trainer(config) as (trainer, model):
        one_step(trainer, 0)
        want = stored(trainer, model)
    with pretended_cuda() as waits, built_trainer(config) as (trainer, model):
        result = one_step(trainer, 0)
        with waits.during() as listing:
            got = stored(trainer, model)
        assert all(tensor.is_cuda for tensor in got.values()) and listing.found == []
        assert_same(got, want)
        progress = TrainingProgress(
            step=1, cursor=layouts.SEQUENCES, updates=1, sums=result.sums, expert_tokens=trainer.model.expert_tokens
        )
        with waits.during() as saving:
            save(tmp_path, trainer, model, progress)
        one_step(trainer, 1)
        found = restore(tmp_path, trainer, model)
        assert found.sums.is_cuda and torch.equal(on_host(found.sums), on_host(result.sums))
        assert_same(stored(trainer, model), want)
    # For state.json. Megatron copies the tensors themselves, all at once.
    assert {place.partition(": ")[2] for place in saving.counted("ours")} == {
        "progress.log_window",
        "progress.damaged_on_all_ranks",
    }
    with built_trainer(config) as (trainer, model):
        restore(tmp_path, trainer, model)
        assert_same(stored(trainer, model), want)
