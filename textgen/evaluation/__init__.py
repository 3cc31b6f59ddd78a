"""How well a sequence is predicted: windows, streams, and the summary of both."""
