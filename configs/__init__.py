"""The YAML files that Hydra composes, installed as package data so that the commands work from any folder."""
