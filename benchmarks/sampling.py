"""Compare the images sampled per second with those of the published way, with the same random weights.

The published way (LlamaGen's `generate`) attends at each step to the whole preallocated cache under a boolean mask,
repeats keys and values for all heads, which copies them, and samples with `multinomial`. A variant of it omits the copy
if heads do not share keys and values. The ways take turns. VQ decoding is not included:

    python -m benchmarks.sampling --out benchmarks/results
    python -m benchmarks.sampling --gpu --out benchmarks/results
"""

import argparse
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import (
    command_line,
    in_the_same_turn,
    machine,
    made_by,
    parsed,
    publish,
    rates_in_turn,
    spread,
)
from npp_ds.model import ModelConfig, Transformer
from npp_ds.model.transformer import Block, RMSNorm, rotary_table, rotate
from npp_ds.sampling.logits_processing import Options
from npp_ds.sampling.sampler import generate
from npp_ds.sizes import SIZES

PUBLISHED, NO_COPY, HERE = "published way", "published way, keys not copied", "this software"
CPU_SIZE = {"n_layers": 6, "n_heads": 4, "dim": 256}
WANTED_ON_H100 = {"XXL": 67, "B": 350}


def random_model(sizes: dict[str, int], grid_size: int, vocab_size: int, device: str) -> Transformer:
    """Return a model with random weights, also in the head: bf16 on a GPU, float32 on the CPU."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(ModelConfig(**sizes, grid_size=grid_size, vocab_size=vocab_size))
        torch.nn.init.normal_(model.output.weight, std=0.02)
    return model.eval().to(torch.bfloat16 if device == "cuda" else torch.float32)


class PublishedWay:
    """LlamaGen's sampler on the weights of a `Transformer`. PyTorch chooses the attention kernel."""

    def __init__(self, model: Transformer, copy_keys: bool = True):
        self.model, self.copy_keys = model, copy_keys

    def _set_up(self, rows: int, device: torch.device) -> None:
        c, weight = self.model.config, self.model.tok_embeddings.weight
        length = -(-(c.grid_size**2 + 1) // 8) * 8
        shape = (rows, c.n_heads, length, c.dim // c.n_heads)
        self.cache = [[torch.zeros(shape, dtype=weight.dtype, device=device) for _ in "kv"] for _ in self.model.layers]
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        self.mask = causal.unsqueeze(0).repeat(rows, 1, 1)
        self.rotary = rotary_table(c.grid_size, c.dim // c.n_heads, device)

    def _norm(self, norm: RMSNorm, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(torch.mean(y * y, dim=-1, keepdim=True) + 1e-5)).type_as(x) * norm.weight

    def _attention(self, block: Block, x: Tensor, position: Tensor, rotary: Tensor, mask: Tensor, cache) -> Tensor:
        a = block.attention
        heads = a.wqkv(x).unflatten(-1, (-1, a.head_dim))
        q, k, v = heads.split([a.heads, a.kv_heads, a.kv_heads], dim=2)
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, rotary), rotate(k, rotary), v))
        shared = a.heads // a.kv_heads
        for kept, new in zip(cache, (k, v), strict=True):
            kept[:, : a.kv_heads, position] = new
        keys, values = (kept[:, : a.kv_heads] for kept in cache)
        if self.copy_keys or shared > 1:
            keys, values = keys.repeat_interleave(shared, dim=1), values.repeat_interleave(shared, dim=1)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return a.wo(out.transpose(1, 2).contiguous().flatten(2))

    def _logits(self, x: Tensor, position: Tensor) -> Tensor:
        mask, rotary = self.mask[:, None, position], self.rotary[position]
        for block, cache in zip(self.model.layers, self.cache, strict=True):
            x = x + self._attention(block, self._norm(block.attention_norm, x), position, rotary, mask, cache)
            x = x + block.feed_forward(self._norm(block.ffn_norm, x))
        return F.linear(self._norm(self.model.norm, x), self.model.output.weight).float()[:, -1]

    @torch.no_grad()
    def generate(self, labels: Tensor, cfg_scale: float, temperature: float = 1.0) -> Tensor:
        """Return int64 codes [B, grid_size**2] for labels[B]; temperature 0 takes the most likely code."""
        c = self.model.config
        null = torch.full_like(labels, c.num_classes)
        self._set_up(2 * len(labels), labels.device)
        x = self.model.cls_embedding(torch.cat([labels, null]))[:, None]
        position = torch.zeros(1, dtype=torch.int64, device=labels.device)
        codes = []
        for _ in range(c.grid_size**2):
            conditional, unconditional = self._logits(x, position).chunk(2)
            logits = unconditional + (conditional - unconditional) * cfg_scale
            p = F.softmax(logits / max(temperature, 1e-5), dim=-1)
            drawn = torch.multinomial(p, num_samples=1) if temperature else torch.topk(p, k=1, dim=-1)[1]
            codes.append(drawn)
            x = F.embedding(torch.cat([drawn, drawn]), self.model.tok_embeddings.weight)
            position += 1
        return torch.cat(codes, dim=1)


def ways_of(model: Transformer, batch: int, cfg_scale: float, device: str) -> dict[str, Callable[[], int]]:
    """Return the ways that take turns; each call samples one batch and returns its number of images."""
    labels, indices = torch.arange(batch, device=device), torch.arange(batch, device=device)
    options, capture = Options(cfg_scale=cfg_scale), device == "cuda"
    return {
        PUBLISHED: lambda: len(PublishedWay(model).generate(labels, cfg_scale)),
        NO_COPY: lambda: len(PublishedWay(model, copy_keys=False).generate(labels, cfg_scale)),
        HERE: lambda: len(generate(model, labels, indices, options, capture=capture)),
    }


def row(name: str, sizes: dict[str, int], options: argparse.Namespace, device: str) -> dict:
    """Measure one model. Ratios are of this software to the other ways in the same turn."""
    model = random_model(sizes, options.grid_size, options.vocab_size, device)
    ways = ways_of(model, options.batch, options.cfg_scale, device)
    rates = rates_in_turn(ways, options.repeats, gpu=device == "cuda")
    return {
        "model": name,
        **sizes,
        "images_per_second": {way: spread(values) for way, values in rates.items()},
        "ratio": {way: in_the_same_turn(rates[HERE], rates[way]) for way in (PUBLISHED, NO_COPY)},
        **({"wanted_on_one_h100": WANTED_ON_H100[name]} if device == "cuda" else {}),
    }


def table(result: dict) -> str:
    gpu = "gpu" in result["machine"]
    lines = [
        f"# Images sampled per second{' on a GPU' if gpu else ''}",
        "",
        f"{result['codes']} codes per image of {result['vocab_size']:,}, guided (scale {result['cfg_scale']:g}), "
        f"batches of {result['batch']}, random weights in {result['dtype']}, no VQ decoding; "
        f"medians of {result['repeats']} turns.",
        "",
        "| model | way | images/s | lowest .. highest | this software to it |",
        "|---|---|---|---|---|",
    ]
    for entry in result["models"]:
        name = f"{entry['model']} ({entry['n_layers']} layers, {entry['dim']} wide)"
        for way, rate in entry["images_per_second"].items():
            ratio = f"{entry['ratio'][way]['median']:.2f}" if way in entry["ratio"] else ""
            lines.append(
                f"| {name} | {way} | {rate['median']:.2f} | {rate['lowest']:.2f} .. {rate['highest']:.2f} | {ratio} |"
            )
    if gpu:
        wanted = ", ".join(f"{e['model']} {e['wanted_on_one_h100']} images/s" for e in result["models"])
        lines += ["", f"Required on one H100: {wanted}."]
    lines += ["", made_by(result, f"{result['threads']} threads")]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(
        __doc__, fast="64 codes per image", gpu="measure the published sizes in bf16 on the first GPU", repeats=5
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=sorted(SIZES), default=list(WANTED_ON_H100), help="with --gpu (%(default)s)")
    add("--batch", type=int, default=16, help="images per batch (16; with --gpu 128)")
    add("--grid-size", type=int, default=16, help="side of the code map (%(default)s)")
    add("--vocab-size", type=int, default=16384, help="codes in the codebook (%(default)s)")
    add("--cfg-scale", type=float, default=2.0, help="scale of classifier-free guidance (%(default)s)")
    add("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="CPU threads (%(default)s)")
    options = parsed(parser, fast={"grid_size": 8}, gpu={"batch": 128})
    torch.set_num_threads(options.threads)
    device = "cuda" if options.gpu else "cpu"
    models = {name: SIZES[name] for name in options.models} if options.gpu else {"small": CPU_SIZE}
    rows = [row(name, sizes, options, device) for name, sizes in models.items()]
    on_gpu = rows if options.gpu else []
    result = {
        "benchmark": "sampling_gpu" if options.gpu else "sampling",
        "fast": options.fast,
        "batch": options.batch,
        "codes": options.grid_size**2,
        "vocab_size": options.vocab_size,
        "cfg_scale": options.cfg_scale,
        "dtype": "bfloat16" if options.gpu else "float32",
        "repeats": options.repeats,
        "threads": options.threads,
        "models": rows,
        "ratios": {
            f"{entry['model']}_to_{short}": round(entry["ratio"][way]["median"], 3)
            for entry in rows
            for short, way in (("published", PUBLISHED), ("published_no_copy", NO_COPY))
        }
        | {f"{entry['model']}_images_per_second": entry["images_per_second"][HERE]["median"] for entry in on_gpu},
        "wanted": {f"{entry['model']}_images_per_second": entry["wanted_on_one_h100"] for entry in on_gpu},
        "machine": machine("torch", gpu=options.gpu),
    }
    publish(result, table(result), options.out)


if __name__ == "__main__":
    main()
