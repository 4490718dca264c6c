"""The processes that train one model together, and what they tell one another."""
