"""Constants of SplitMix64, the mixing function of every keyed hash of this package.

Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014. The function
maps 64-bit integers to 64-bit integers, modulo 2^64:

    x = (x ^ (x >> 30)) * MULTIPLIER_1
    x = (x ^ (x >> 27)) * MULTIPLIER_2
    x = x ^ (x >> 31)

`common.keyed_random` evaluates it on torch tensors, for noise. `data.order` evaluates it on NumPy
arrays, for the order of sequences. The order of a run never depends on torch.
"""

INCREMENT = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB
