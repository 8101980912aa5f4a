"""Generation: requests, the one loop, the offline interface."""
