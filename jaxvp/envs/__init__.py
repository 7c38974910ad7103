"""Simulated environments that come with jaxvp."""
