"""Recipes: the one reader of YAML files and their options, and what is done with what they say."""
