"""Shipped settings that Hydra composes: YAML files, installed as package data so that the commands work from any folder."""
