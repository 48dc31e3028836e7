"""The benchmark of a training step at full width on one GPU, which `twotower bench gpu` runs.

It takes the first layers of the recipe's pattern that fit by the memory plan, and times a
next-token step and a two-tower step of that backbone. The objectives run one after the other,
because both trainers together do not fit. Results: times, operations per second by the formulas of
`plan/flops.py`, peak memory against the plan, time by class of kernel, the two-stream scan against
its minimal memory traffic, and, as a ladder, the effect of each setting and each kernel.

Without CUDA the same code runs on the CPU. Its results then only show that the command works.
"""
