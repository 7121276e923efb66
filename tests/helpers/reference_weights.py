"""The weights behind the vectors in `tests/data`: a rule, so that no weight file is needed.

state_dict = fill({name: shape, ...}, seed)
"""

import zlib

import numpy as np


def fill(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """One float32 array per parameter name, drawn from a generator keyed by (seed, crc32(name)).

    1-d weights with 'norm' in the name: 1 + 0.1 x; other 1-d tensors: 0.1 x; the rest: x / sqrt(fan_in).
    Integer buffers are not touched and must not be passed.
    """
    weights = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        x = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            x = 1 + 0.1 * x if "norm" in name and name.endswith("weight") else 0.1 * x
        else:
            x = x * np.float32(np.prod(shape[1:]) ** -0.5)
        weights[name] = x.astype(np.float32)
    return weights
