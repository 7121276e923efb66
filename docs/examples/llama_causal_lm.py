"""Next Patch Prediction needs no change of architecture: a stock `LlamaForCausalLM` learns grouped codes.

pip install transformers && python docs/examples/llama_causal_lm.py
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from npp_ds.model import patch_cross_entropy
from npp_ds.model.patches import group, mean_embedding

VOCAB_SIZE, NUM_CLASSES, GRID_SIZE = 64, 4, 8


def build_model() -> LlamaForCausalLM:
    """A tiny Llama; class c is its token VOCAB_SIZE + c."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE + NUM_CLASSES, max_position_embeddings=256, **sizes))


def patch_loss(model: LlamaForCausalLM, codes: Tensor, labels: Tensor) -> Tensor:
    """codes[B, N, k], labels[B] -> nats per code: patches enter as mean embeddings, all k codes are scored."""
    table = model.get_input_embeddings().weight
    inputs = torch.cat([table[VOCAB_SIZE + labels][:, None], mean_embedding(codes[:, :-1], table)], dim=1)
    hidden = model.model(inputs_embeds=inputs).last_hidden_state
    return patch_cross_entropy(hidden, model.lm_head.weight, codes)


def make_codes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Toy code maps int64 [count, GRID_SIZE**2] and labels: ramps whose direction is the class, and noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    down, right = torch.meshgrid(torch.arange(GRID_SIZE), torch.arange(GRID_SIZE), indexing="ij")
    ramps = torch.stack([down, right, down + right, down - right + GRID_SIZE])
    start = torch.randint(32, (count, 1, 1), generator=generator)
    noise = torch.randint(2, (count, GRID_SIZE, GRID_SIZE), generator=generator)
    return (start + 2 * ramps[labels] + noise).clamp(max=VOCAB_SIZE - 1).flatten(1), labels


def train(model: LlamaForCausalLM, patch_side: int, steps: int, batch_size: int = 32) -> list[float]:
    """One stage at one patch side; returns the loss of every step."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for step in range(steps):
        codes, labels = make_codes(batch_size, seed=step)
        loss = patch_loss(model, group(codes, patch_side), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    llama = build_model()
    for side, length in ((4, 60), (2, 60), (1, 120)):
        history = train(llama, side, length)
        print(f"patch side {side}: {length} steps, {history[0]:.3f} -> {history[-1]:.3f} nats per code")
