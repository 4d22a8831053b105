"""FederatedRound: observe, decide, carry out."""
