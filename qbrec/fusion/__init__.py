"""Stage 1: inject the meaning of text, image, structure and behaviour into one vector per item."""
