"""SDRRL's training set: a model's own answers in other languages, and what goes with them."""
