"""A program is carried out in one nnsight trace, here or on a server; each file is imported by name."""
