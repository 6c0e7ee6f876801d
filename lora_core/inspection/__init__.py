"""What an adapter adds: statistics, a verdict, comparisons, plots."""
