"""The processes that train one model together: what they tell one another."""
