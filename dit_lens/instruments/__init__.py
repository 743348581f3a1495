"""Single measurements on a lens, one in each file; the methods of DiTLens call them."""
