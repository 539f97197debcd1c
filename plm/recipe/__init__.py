"""Recipes: YAML files and their options are read here, and run."""
