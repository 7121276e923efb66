"""The config of a run: its schema, how it is loaded from recipes and overrides, and the stage schedule it describes.

Pure: no torch, no processes, no files but YAML.
"""
