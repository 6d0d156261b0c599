"""Text on its way into the models: sources → tokens → packed rows → batches. Knows no model."""
