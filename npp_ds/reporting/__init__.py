"""What a run did, for people: tables, plots and pages made from the files in its folder.

Imports no torch, but for one picture of a report's page, when that is made; only the command line imports it.
"""
