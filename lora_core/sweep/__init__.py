"""How strong an adapter should be: cells, measures, a verdict, plots."""
