"""What applications import: open a flow, wait for its turn, send. Standard library only."""
