"""Nearest centroids: several kernels, one answer.

Every kernel returns, for each row x, the code k that maximises x·c_k - |c_k|²/2, decided in float64 wherever
its own arithmetic is too coarse to tell two codes apart, the lowest code on exact ties. So codes do not
depend on which kernel ran, and a rank may take the one that its own device runs fastest (`choose`).

    gemm.py      float32 GEMM and arg-max; the reference, and the fastest for a single pass on most CPUs
    bfloat16.py  the same with a bfloat16 GEMM, where the device multiplies those faster
    pruned.py    GEMM on a few principal directions, exact dot products only for codes that can still win
    native.py    the loops of pruned.py, compiled by numba
    fused.py     distance and arg-min in one Triton kernel, on CUDA
    choose.py    measures them on rows at hand
"""
