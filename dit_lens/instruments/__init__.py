"""Single measurements on a lens, which the methods of DiTLens call; each file is imported by name."""
