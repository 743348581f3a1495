"""Ops become a program: plain data, in the order in which the model computes; each file is imported by name."""
