"""From weights to images: decoding codes with a cache and guidance, turning them into pixels, writing them down.

It builds on `model` and `tokenizer` and reads run folders; it may not touch training state, data order or DeepSpeed.
"""
