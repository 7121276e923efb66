"""Numbers about a trained model: likelihood of held-out codes, and how samples compare with real images.

It reads models, codes and images and returns numbers; it may not touch training state, DeepSpeed or how samples are
drawn.
"""
