"""Scores computed one token at a time."""

import itertools
import math

import torch

from helpers.modeling import MASK


def cross_entropy(logits, target):
    return float(-logits.detach().double().log_softmax(-1)[target])


def exact_score(model, context, continuation, block):
    """All masks of the text in each block, with all later blocks masked.

    (k - 1)! (n - k)! / n! x masked nats.
    """
    total = 0.0
    for start in range(0, len(continuation), block):
        text = continuation[start : start + block]
        cache = model.prefill(torch.tensor([context + continuation[:start]]))
        n = len(text)
        for bits in itertools.product([False, True], repeat=n):
            if k := sum(bits):
                ids = [MASK if b else token for b, token in zip(bits, text, strict=True)] + [MASK] * (block - n)
                t = torch.tensor([ids.count(MASK) / block])
                logits = model.denoise_block(torch.tensor([ids]), t, cache)[0]
                nats = sum(cross_entropy(logits[j], text[j]) for j in range(n) if bits[j])
                total += nats * math.factorial(k - 1) * math.factorial(n - k) / math.factorial(n)
    return -total
