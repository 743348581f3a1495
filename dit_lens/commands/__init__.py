"""The command line and what it writes: demo, findings, pages; nothing imports it."""
