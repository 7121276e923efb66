"""`npp doctor`: check machine, processes and run in seconds, and report what would stop the run, on which node.

Uses most other packages and leaves nothing behind; only the command line imports it.
"""
