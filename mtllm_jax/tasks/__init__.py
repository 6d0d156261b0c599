"""Tasks: how a row becomes inputs, a head and a metric."""
