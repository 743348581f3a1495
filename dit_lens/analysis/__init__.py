"""Arrays in, numbers out, and no model: ``channels``, ``metrics`` and ``clusters`` are imported from here."""
