"""Every test user, every item, every baseline: ranks, metrics with intervals, slices, paired differences."""
