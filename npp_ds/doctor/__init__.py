"""`npp doctor`: says in seconds, and before a run begins, what would stop it later, on which node, and what to do.

Looks at what the other rooms will use and leaves nothing behind; nothing imports it but the command line.
"""
