"""What a run did, for people: tables, plots and pages made from the files in its folder.

Computes nothing with a model and imports no torch; only the command line imports it.
"""
