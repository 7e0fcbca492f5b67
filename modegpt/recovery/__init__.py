"""What may follow compression: training that wins back some of what was lost, and never touches the test text."""
