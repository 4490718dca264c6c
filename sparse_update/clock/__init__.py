"""What a step costs: counted components and their measured times."""
