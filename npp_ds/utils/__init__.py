"""Helpers without domain knowledge: files and locks, hash RNG, GPU specifications, records, logs, progress, format.

They import nothing of npp_ds but `errors`.
"""
