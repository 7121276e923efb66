"""Next Patch Prediction needs no change of architecture or inference: a stock `LlamaForCausalLM` learns grouped codes.

pip install torch transformers && pip install --no-deps . && python docs/examples/llama_causal_lm.py

`npp_ds.model` needs torch only. To leave out padding, as `ignore_index` does, select rows:
`patch_cross_entropy(hidden[keep], weight, targets[keep])`. An output bias is one more column: `cat([hidden, ones], -1)`
with `cat([weight, bias[:, None]], -1)`. The loss is the mean; multiply it by the number of rows for the sum.
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from npp_ds.model import mean_embedding, patch_cross_entropy
from npp_ds.model.patches import group

VOCAB_SIZE, NUM_CLASSES, GRID_SIZE = 64, 4, 8
CLASS_DROPOUT = 0.1


def build_model() -> LlamaForCausalLM:
    """A tiny Llama; class c is its token VOCAB_SIZE + c, and c = NUM_CLASSES is the null class of guidance."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vocabulary = VOCAB_SIZE + NUM_CLASSES + 1
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # or they would be codes
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=256, **sizes, **special))


def patch_loss(model: LlamaForCausalLM, codes: Tensor, labels: Tensor) -> Tensor:
    """codes[B, N, k], labels[B] -> nats per code: patches enter as mean embeddings, all k codes are scored."""
    table = model.get_input_embeddings().weight
    inputs = torch.cat([table[VOCAB_SIZE + labels][:, None], mean_embedding(codes[:, :-1], table)], dim=1)
    hidden = model.model(inputs_embeds=inputs).last_hidden_state
    return patch_cross_entropy(hidden, model.lm_head.weight, codes)


def drop_classes(labels: Tensor) -> Tensor:
    """Replace a share CLASS_DROPOUT of the labels by the null class, so that the model learns to do without them."""
    return labels.masked_fill(torch.rand(labels.shape) < CLASS_DROPOUT, NUM_CLASSES)


def sample(model: LlamaForCausalLM, labels: Tensor, cfg_scale: float = 1.0) -> Tensor:
    """labels[B] -> codes[B, GRID_SIZE**2]: the generation and the guidance of transformers, which know no patches."""
    null = torch.full_like(labels, VOCAB_SIZE + NUM_CLASSES)[:, None]
    guidance = {"guidance_scale": cfg_scale, "negative_prompt_ids": null} if cfg_scale != 1 else {}
    classes = list(range(VOCAB_SIZE, VOCAB_SIZE + NUM_CLASSES + 1))
    start = VOCAB_SIZE + labels[:, None]
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": GRID_SIZE**2, "suppress_tokens": classes, **guidance}
    return model.generate(start, attention_mask=torch.ones_like(start), **options)[:, 1:]


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
        loss = patch_loss(model, group(codes, patch_side), drop_classes(labels))
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
    print(sample(llama, torch.tensor([0]), cfg_scale=2.0).view(GRID_SIZE, GRID_SIZE))
