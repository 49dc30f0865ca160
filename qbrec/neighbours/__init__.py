"""Item graphs beside the semantic IDs: what follows what in histories, what is like what in content."""
