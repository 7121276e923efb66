"""Helpers without domain knowledge: files, locks, hash RNG, GPU specifications, progress.

Imports nothing of npp_ds but `errors`.
"""
