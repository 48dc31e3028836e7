"""The program on a device that is not the host: nothing mixed, nothing waited for in vain, the same numbers."""

import layouts
import pytest
import torch
from models import build_two_tower, tiny_config
from pretended_device import Pretended, Waits, WrongDevice, on_host, pretended_cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_twotower import build, host, parallel, trainer
from megatron_twotower.corruption import corrupt
from megatron_twotower.host import RELEASE
from megatron_twotower.loss import masked_diffusion_loss
from megatron_twotower.optimizer import build_optimizer, build_schedule
from megatron_twotower.phases import plan
from megatron_twotower.records import Batch
from megatron_twotower.validation import validate


def test_a_planted_mix_up_is_found():
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
        # What a card takes: numbers of the host in pointwise operations, and its indices.
        assert on_host(x * torch.tensor(2.0)).tolist() == [2.0] * 3
        assert on_host(x[torch.tensor([0, 2])]).tolist() == [1.0] * 2
        with pytest.raises(WrongDevice):
            torch.stack([x[0], torch.tensor(1.0)])
        with pytest.raises(TypeError, match="cuda:0"):
            x.numpy()


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
    assert waits.found[0].where.startswith("test_pretended_device.py:")


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait_is_not_counted(name):
    with pretended_cuda() as waits:
        FREE[name](torch.ones(3, device="cuda"))
    assert waits.found == []


def test_modules_move_and_learn_there_as_on_the_host():
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


# --- training -----------------------------------------------------------------------------------------------------


def as_there():
    """On the host, attention by the same operations as there."""
    return sdpa_kernel(SDPBackend.MATH)


def two_tower_pass(config, groups):
    """Loss and gradients of a forward and backward pass of two towers."""
    model, _ = build_two_tower(config, groups)
    model.train()
    tokens = torch.randint(4, 48, (2, 16), generator=torch.Generator().manual_seed(0))
    noisy = corrupt(Batch(tokens, *[torch.arange(2)] * 3), config.noise, seed=3).to(host.device())
    report = masked_diffusion_loss(model.tower, model(noisy), noisy, config.noise, groups)
    report.total.backward()
    return report, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["", "ME*-"])
def test_two_towers_forward_and_backward(groups, recompute):
    config = tiny_config("ME*-M*", recompute_layers=recompute)
    with as_there():
        want, gradients = two_tower_pass(config, groups)
    with pretended_cuda() as waits:
        got, there = two_tower_pass(config, groups)
    assert all(tensor.is_cuda for tensor in (*vars(got).values(), *there.values()))
    assert torch.equal(on_host(got.total), want.total) and torch.equal(on_host(got.count), want.count)
    assert there.keys() == gradients.keys()
    for name, gradient in there.items():
        assert torch.equal(on_host(gradient), gradients[name]), name
    # Of our own lines, those alone that read the weights wait.
    assert {wait.where.partition(" ")[2] for wait in waits.of("ours")} == {"weights.load_weights"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return layouts.write_backbone(tmp_path_factory.mktemp("backbone") / "hf")


def two_steps(config, waits):
    """Sums, gradient norms and parameters of two steps of training, what the second waited for, and the trainer."""
    validate(config, world_size=1)
    groups = parallel.initialise(config)
    try:
        model = build.build_model(config, groups)
        wrapped = parallel.wrap(model.chunks, config, groups)
        optimizer = build_optimizer(config, wrapped, groups)
        parts = trainer.Trainer(
            config, wrapped, optimizer, build_schedule(config, optimizer), groups, plan(config)
        )  # fmt: skip
        sums, norms = [], []
        for step in range(2):
            batches = layouts.micro_batches(config, groups, step)
            with waits.during() as second:
                done = trainer.train_step(parts.at(step * layouts.SEQUENCES), batches)
            assert done.taken
            sums.append(done.sums)
            norms.append(done.norm)
        parameters = {name: p.detach() for chunk in model.chunks for name, p in chunk.named_parameters()}
        validation = trainer.validate(parts, layouts.micro_batches(config, groups, 0))
        return sums, norms, parameters, second, validation
    finally:
        parallel.shutdown()


STEPS = [("ar", True), ("plain", False)]
SLOW_STEPS = [("hard", True), ("hard", False), ("bf16", True), ("bf16", False)]


@pytest.mark.parametrize(
    ("kind", "distributed"), [*STEPS, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW_STEPS)]
)
def test_steps_of_training(backbone, kind, distributed):
    """Megatron's schedule, gradient buffers and optimizers too. Nothing of ours waits but for whether the loss is
    finite, once, right after Megatron has waited for the norm."""
    config = layouts.changed(layouts.base(backbone), layouts.RUNS[kind])
    config = layouts.changed(config, {"optimizer": {"distributed": distributed}})
    with as_there():
        sums, norms, parameters, _, validation = two_steps(config, Waits())
    with pretended_cuda() as waits:
        there = two_steps(config, waits)
    assert all(torch.equal(on_host(got), want) for got, want in zip(there[0], sums, strict=True))
    assert there[1] == norms and there[4] == validation
    for name, got in there[2].items():
        assert torch.equal(on_host(got), parameters[name]), name
    second = there[3]
    assert second.counted("ours") == {"a number: optimizer.guarded_step": 1}
    # Megatron's: the sum of tokens (up to 0.16), and the norm; and, in layers of experts, what each micro-batch sends
    # to whom.
    counted = second.counted("megatron")
    assert counted.pop("a number: finalize_model_grads.finalize_model_grads", 0) == (RELEASE == "0.16")
    assert counted.pop("a number: clip_grads.get_grad_norm_fp32") == 1
    assert {place.partition(": ")[2].partition(".")[0] for place in counted} == {"moe_utils", "experts"}
    assert len(second.of("others")) == 0
