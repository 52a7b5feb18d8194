"""The commands, each an importable function; `skipnet.cli` dispatches to them."""
