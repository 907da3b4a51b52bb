"""Search for the best value of a setting, in rounds of whole trainings over one store."""
