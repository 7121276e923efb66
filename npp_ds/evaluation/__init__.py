"""Numbers about a trained model: likelihood of held-out codes, and how samples compare with real images.

It reads models, codes and images and returns numbers; it may not touch training state or DeepSpeed. `sweep.py` alone
has samples drawn, by `npp_ds.sampling`, which says how; nothing there knows of evaluation.
"""
