"""The command line and what it writes (demo, findings, pages); each file is imported by name."""
