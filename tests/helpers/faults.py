"""Faults that tests plant in a run."""

from megatron_twotower.train import loop


def with_bad_steps(monkeypatch, bad, *, loss=False):
    """Make the gradients of some steps, counted from 1, infinite or NaN; or only the loss."""
    original, calls = loop.forward_backward, iter(range(1, 1000))

    def forward_backward(trainer, micro_batches, *, forward_only, **keywords):
        sums = original(trainer, micro_batches, forward_only=forward_only, **keywords)
        if not forward_only and (step := next(calls)) in bad:
            if loss:
                sums[0] = float("inf")
            else:
                first = next(p for p in trainer.model.only.parameters() if p.requires_grad)
                first.main_grad[0] = float("nan") if step % 2 else float("inf")
        return sums

    monkeypatch.setattr(loop, "forward_backward", forward_backward)
