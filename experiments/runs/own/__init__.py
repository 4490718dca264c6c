"""Runs of a model of one's own: settings, the task found by its name, one arm in its folder, all arms of a comparison."""
