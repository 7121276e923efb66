"""What a run does or will do, for people: tables, plots and pages made from the files in its folder or from its plan.

Imports no torch, but for one picture of a report's page, when that is made; only the command line imports it.
"""
