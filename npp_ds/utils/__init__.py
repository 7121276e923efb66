"""Helpers without domain knowledge: files and locks, hash RNG, GPU specifications, records, screen, format.

They import nothing of npp_ds but `errors`.
"""
