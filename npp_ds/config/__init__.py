"""The config of a run: its schema, loading from recipes and overrides, and the stage schedule that follows from it.

This package uses no torch and no processes, and reads no files but YAML.
"""
