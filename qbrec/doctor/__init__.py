"""Whether this machine can do a run: small checks, each saying what is wrong and how to mend it."""
