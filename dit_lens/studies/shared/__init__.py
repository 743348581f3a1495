"""What every study uses: arguments, arms, judges, batches, checkpoints, results; each file is imported by name."""
