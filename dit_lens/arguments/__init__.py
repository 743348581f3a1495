"""What users give to public calls: checked, and made Python's own; each file is imported by name."""
