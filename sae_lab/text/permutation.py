"""A pseudo-random permutation of range(n) that is computed element by element, without a table."""

from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray as Array
from numpy.typing import NDArray

ROUNDS = 6
MIN_HALF_BITS = 3  # the fewest bits of half a number; halves of one or two bits hardly mix


def permute(i: Int64[Array, "m"], n: int, *key: int) -> Int64[Array, "m"]:
    """Return the images of the numbers `i` under the permutation of range(n) that `key` draws.

    A Feistel network permutes range(4^h) ⊇ range(n): each of its ROUNDS maps the halves (L, R) of a number, h bits
    each, to (R, L xor F(R, round key)). An image outside of range(n) is permuted again until it falls inside ("cycle
    walking"), which takes less than 4 steps on average for n ≥ 16. Memory and time do not depend on n.

    References:
        Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002.
    """
    half = max(MIN_HALF_BITS, ((n - 1).bit_length() + 1) // 2)
    round_keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    image = feistel(i.astype(np.uint64), half, round_keys)
    while len(outside := np.flatnonzero(image >= n)):
        image[outside] = feistel(image[outside], half, round_keys)
    return image.astype(np.int64)


def feistel(x: NDArray[np.uint64], half: int, round_keys: NDArray[Any]) -> NDArray[np.uint64]:
    """Permute the numbers below 4^half."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> bits, x & mask
    for round_key in round_keys:
        left, right = right, left ^ (mix(right + round_key) & mask)
    return (left << bits) | right


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit numbers: the finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
