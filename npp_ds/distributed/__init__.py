"""Processes of one launch: rank and world size from the launcher's variables, the process group, a shared work queue.

Knows nothing of models, data or DeepSpeed.
"""
