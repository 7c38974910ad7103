"""Commands that join data, models and weights."""
