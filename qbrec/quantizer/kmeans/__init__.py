"""k-means over the rows of all ranks: the same centroids, bit for bit, however the rows are shared.

chunks.py   the row grid, fixed-point sums, samples
seeding.py  starting centroids
kernels/    nearest centroids, as fast as the device can
sums.py     sums per code that follow rows as they move
lloyd.py    iterations over all rows
fit.py      seeds, a first approximation, passes over everything
"""
