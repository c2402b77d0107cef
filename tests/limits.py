"""The timeout of tests, in seconds, long enough for a slow and busy machine."""

LIMIT_S = 500.0
