"""The idea: gates, decisions, the network that routes, and the record of what it did."""
