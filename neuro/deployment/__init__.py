"""A converted model that runs: host parts in torch, mapped parts on integer graphs."""
