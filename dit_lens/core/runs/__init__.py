"""What a run leaves, and how it is kept in a folder; each file is imported by name and needs no model."""
