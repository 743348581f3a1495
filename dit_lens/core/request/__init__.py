"""What is asked of a run: its ops, its call of the pipeline and its steps; each file is imported by name."""
