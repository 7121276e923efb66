"""What a run did, for people: tables, plots and pages made from the files in its folder.

It reads files and computes nothing on a model; it may not import torch, and no other room may depend on it.
"""
