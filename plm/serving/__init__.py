"""Rewards over HTTP that know their user: the service, and the server around it."""
