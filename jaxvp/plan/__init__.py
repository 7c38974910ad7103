"""What a config costs: `python -m jaxvp.plan`."""
