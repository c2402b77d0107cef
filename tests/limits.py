"""How long a test waits for what must happen: long enough for a machine that is new, slow and busy with
others.
"""

LIMIT_S = 500.0
