"""Items added to a finished run: codes by the frozen quantizer, beside IDs that never move.

run.py        one generation of fused vectors in, its IDs out
beside.py     where new items go when their ID is taken
drift.py      whether the quantizer still fits what is new
grown_ids.py  reading the IDs of the catalogue and all generations
"""
