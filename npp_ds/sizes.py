"""Model sizes (LlamaGen, arXiv 2406.06525, table 1; 1B and 2B are ours), parameter and FLOP counts. Needs no torch.

An entry in `SIZES` adds a size everywhere: to the config, to `npp plan` and to the import of published weights.
"""

SIZES: dict[str, dict[str, int]] = {
    "B": {"n_layers": 12, "n_heads": 12, "dim": 768},
    "L": {"n_layers": 24, "n_heads": 16, "dim": 1024},
    "XL": {"n_layers": 36, "n_heads": 20, "dim": 1280},
    "1B": {"n_layers": 40, "n_heads": 22, "dim": 1408},
    "XXL": {"n_layers": 48, "n_heads": 24, "dim": 1536},
    "2B": {"n_layers": 48, "n_heads": 28, "dim": 1792},
}

LOGITS_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
"""Size of a chunk of float32 logits in the patch loss: on a CPU enough rows for fast products (512 at 16384 codes,
measured faster than 256 and no slower than 1,024), on a GPU enough to fill the device."""


def num_positions(grid_size: int, patch_side: int) -> int:
    """Return the length of the sequence that a grid_size x grid_size map of codes becomes: one position per patch."""
    return (grid_size // patch_side) ** 2


def ffn_hidden(dim: int, multiple_of: int = 256) -> int:
    """Return the width of the SwiGLU layer: two thirds of 4 x dim, rounded up to a multiple."""
    hidden = 2 * 4 * dim // 3
    return -(-hidden // multiple_of) * multiple_of


def block_parameters(dim: int, n_heads: int, n_kv_heads: int | None = None, ffn_multiple_of: int = 256) -> int:
    """Return the matrix parameters of a transformer block (attention and feed-forward, without its two norms)."""
    qkv = dim + 2 * (n_kv_heads or n_heads) * (dim // n_heads)
    return dim * (qkv + dim + 3 * ffn_hidden(dim, ffn_multiple_of))


def parameter_count(
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int | None = None,
    vocab_size: int = 16384,
    num_classes: int = 1000,
    ffn_multiple_of: int = 256,
) -> int:
    """Return the number of trainable parameters of a `Transformer` of these sizes, without building it."""
    blocks = n_layers * (block_parameters(dim, n_heads, n_kv_heads, ffn_multiple_of) + 2 * dim)
    return blocks + dim * (2 * vocab_size + num_classes + 1 + 1)


def training_flops(
    positions: int,
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int | None = None,
    vocab_size: int = 16384,
    ffn_multiple_of: int = 256,
) -> int:
    """Return the FLOPs of training on one image of `positions` positions.

    They are 6 per matrix parameter and position, plus causal attention: its two products over half of all pairs of
    positions, once forward and twice backward.
    """
    matrices = n_layers * block_parameters(dim, n_heads, n_kv_heads, ffn_multiple_of) + vocab_size * dim
    return 6 * matrices * positions + 6 * n_layers * dim * positions * positions
