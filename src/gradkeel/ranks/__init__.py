"""What ranks tell each other: who takes part, which pieces each has, and the one exchange of a step."""
