"""Where bytes live: artifacts with a commit protocol, block tars, the resumable loader."""
