"""Our simulator beside those of others, each in a process of its own: `spikegate bench simulator --peers`."""
