"""Computation on arrays, independent of any model; import ``channels``, ``clusters`` and ``metrics`` from here."""
