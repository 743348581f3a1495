"""What looking costs, measured beside what a person would use instead: ``python3 dev.py bench``."""
