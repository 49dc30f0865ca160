"""Stage 0: input contract, validation, feature encoders, item index and user histories."""
