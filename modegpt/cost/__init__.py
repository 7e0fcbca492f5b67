"""What a run costs and what the machine could do: stages metered, work counted, the ceiling measured."""
