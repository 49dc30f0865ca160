"""The finished model at work: recommendations for all users at once, and an HTTP service."""
