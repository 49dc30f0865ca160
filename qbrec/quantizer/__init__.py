"""Stage 2: distributed k-means, residual vector quantizer, collisions, quality and labels of semantic IDs."""
