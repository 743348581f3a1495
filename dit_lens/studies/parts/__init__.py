"""Pieces that one or two studies are made of; only studies import them."""
