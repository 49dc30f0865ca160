"""Public data sets and plain CSV → the input contract (items.parquet, interactions.parquet)."""
