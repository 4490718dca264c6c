"""Model families through conversion: how much of each is mapped, what it loses, how often it crosses to the host."""
