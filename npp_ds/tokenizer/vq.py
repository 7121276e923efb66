"""The VQ tokenizer of LlamaGen (arXiv 2406.06525): images to codes and back, with the published parameter names."""

import json
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npp_ds.utils.hub import WEIGHTS_FILE, HubModel


@dataclass(frozen=True)
class VQConfig:
    """Shape of a tokenizer; the defaults are those of VQ-16."""

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8
    norm_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))  # JSON has lists

    @property
    def downsample(self) -> int:
        """Pixels per code along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)


METADATA_KEY = "npp_vq"  # in safetensors; one entry, because safetensors writes several in no fixed order
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
HALF_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

VQ16 = VQConfig()
VQ8 = VQConfig(channel_multipliers=(1, 2, 2, 4))


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each after a norm and SiLU, added to a shortcut; x[B, C_in, H, W] -> [B, C_out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Single-head attention over all positions of the feature map, x[B, C, H, W] -> the same shape."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (project(h).flatten(2).transpose(1, 2) for project in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """A convolution of stride 2, x[B, C, H, W] -> [B, C, H/2, W/2]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling and a convolution, x[B, C, H, W] -> [B, C, 2H, 2W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks, each followed by attention if `attention`, then the change of resolution if there is one.

    x[B, C_in, H, W] -> [B, C_out, H', W'] with H' and W' half, the same or twice H and W.
    """

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int, attention: bool):
        super().__init__()
        self.res = nn.ModuleList(
            ResBlock(out_channels if i else in_channels, out_channels, groups) for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttentionBlock(out_channels, groups) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def _middle(channels: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResBlock(channels, channels, groups), AttentionBlock(channels, groups), ResBlock(channels, channels, groups)]
    )


class Encoder(nn.Module):
    """Encodes images [B, 3, H, W] to latents [B, z_channels, H / downsample, W / downsample]."""

    def __init__(self, config: VQConfig):
        super().__init__()
        groups, last = config.norm_groups, len(config.channel_multipliers) - 1
        widths = [config.channels, *(config.channels * m for m in config.channel_multipliers)]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i in range(last + 1):
            level = Level(widths[i], widths[i + 1], config.num_res_blocks, groups, attention=i == last)
            if i < last:
                level.downsample = Downsample(widths[i + 1])
            self.conv_blocks.append(level)
        self.mid = _middle(widths[-1], groups)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Decodes latents [B, z_channels, h, w] to images [B, 3, h * downsample, w * downsample]."""

    def __init__(self, config: VQConfig):
        super().__init__()
        groups, last = config.norm_groups, len(config.channel_multipliers) - 1
        widths = [config.channels * m for m in (config.channel_multipliers[-1], *reversed(config.channel_multipliers))]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], groups)
        self.conv_blocks = nn.ModuleList()
        for i in range(last + 1):
            level = Level(widths[i], widths[i + 1], config.num_res_blocks + 1, groups, attention=i == 0)
            if i < last:
                level.upsample = Upsample(widths[i + 1])
            self.conv_blocks.append(level)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Codebook(nn.Module):
    """Vectors on the unit sphere. The code of a latent is that of the nearest vector after l2 normalisation."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def vectors(self) -> Tensor:
        """Return the vectors, float [codebook_size, codebook_dim], each of length 1."""
        return F.normalize(self.embedding.weight, dim=-1)

    def nearest(self, latents: Tensor) -> Tensor:
        """Return the codes int64 [...] of latents [..., codebook_dim] of any length."""
        return (F.normalize(latents, dim=-1) @ self.vectors().T).argmax(-1)


class VQModel(nn.Module, HubModel):
    """Encodes images to codes and decodes codes to images. `name` and `sha256` are those of the file of its weights."""

    name = "untrained"
    sha256 = ""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.codebook_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)
        self._half_copies: dict[tuple[torch.dtype, torch.device], tuple[nn.Module, nn.Module]] = {}

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write model.safetensors in float32. Its metadata names the file of weights that cannot be trained."""
        from safetensors.torch import save_file

        loaded = self.sha256 and not any(p.requires_grad for p in self.parameters())
        origin = {"origin": {"name": self.name, "sha256": self.sha256}} if loaded else {}
        metadata = {METADATA_KEY: json.dumps({"config": asdict(self.config), **origin})}
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, save_directory / WEIGHTS_FILE, metadata)

    @property
    def downsample(self) -> int:
        return self.config.downsample

    def latents(self, images: Tensor) -> Tensor:
        """Return unnormalised latents float [B, h, w, codebook_dim] of images float [B, 3, H, W] in [-1, 1]."""
        return self.quant_conv(self.encoder(images)).permute(0, 2, 3, 1)

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Return images float [B, 3, H, W] (about [-1, 1], not clamped) of unit vectors [B, h, w, codebook_dim]."""
        return self.decoder(self.post_quant_conv(vectors.permute(0, 3, 1, 2)))

    def _half(self, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        """Return copies of encoder and quant_conv with weights of `dtype`, made once.

        Autocast would run the normalisations, half of the memory traffic, in fp32.
        """
        device = self.quant_conv.weight.device
        if (dtype, device) not in self._half_copies:
            encoder, quant_conv = deepcopy(self.encoder).to(dtype), deepcopy(self.quant_conv).to(dtype)
            self._half_copies[dtype, device] = encoder, quant_conv
        return self._half_copies[dtype, device]

    @torch.no_grad()
    def encode(self, images: Tensor, precision: str = "fp32") -> Tensor:
        """Return codes int64 [B, T] in raster order of images float [B, 3, H, W] in [-1, 1]; `downsample` divides H, W.

        `precision` is that of the encoder, one of PRECISIONS; the nearest code is always found in fp32. A code is -1
        where the encoder returned numbers that are not finite.
        """
        dtype = HALF_TYPES.get(precision, torch.float32)
        encoder, quant_conv = self._half(dtype) if dtype != torch.float32 else (self.encoder, self.quant_conv)
        with full_precision(tf32=precision == "tf32"):
            latents = quant_conv(encoder(images.to(dtype))).permute(0, 2, 3, 1).float()
        with full_precision():
            codes = self.quantize.nearest(latents)
        return codes.masked_fill(~latents.isfinite().all(-1), -1).flatten(1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return images float [B, 3, H, W] (about [-1, 1], not clamped) of square code maps int64 [B, T]."""
        side = round(codes.shape[1] ** 0.5)
        if side * side != codes.shape[1]:
            raise ValueError(f"codes of shape {tuple(codes.shape)} are no square maps")
        with full_precision():
            return self.reconstruct(self.quantize.vectors()[codes.view(-1, side, side)])


class full_precision:
    """A context manager in which float32 convolutions and products use TF32 only if `tf32` is set.

    So codes depend neither on a global flag nor on which of several algorithms cuDNN finds to be the fastest.
    """

    def __init__(self, tf32: bool = False):
        self.tf32 = tf32

    def __enter__(self) -> None:
        cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        self.saved = (cuda.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark)
        cuda.allow_tf32 = cudnn.allow_tf32 = self.tf32
        cudnn.deterministic, cudnn.benchmark = True, False

    def __exit__(self, *_: object) -> None:
        cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        cuda.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = self.saved


def to_input(images: Tensor, out: Tensor | None = None) -> Tensor:
    """Convert uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1] for `VQModel.encode`, channels-last in memory.

    `out`, float32 [B, H, W, 3], is memory for the result.
    """
    floats = images.float() if out is None else out.copy_(images)
    return floats.div_(127.5).sub_(1).permute(0, 3, 1, 2)


def to_uint8(images: Tensor) -> Tensor:
    """Convert float [B, 3, H, W] of `VQModel.decode` to uint8 [B, H, W, 3], truncating as the published sampler."""
    return images.float().mul(127.5).add(128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).contiguous()
