"""What an adapter is: weights by module, their delta, strengths, a report."""
