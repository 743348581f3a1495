"""Pieces that one or two studies are made of; each file is imported by name, and by studies only."""
