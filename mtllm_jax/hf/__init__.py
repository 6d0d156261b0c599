"""Hugging Face folders in and out. The only room that knows their names for things."""
