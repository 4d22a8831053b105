"""FederatedClient: what its ledger says, as status."""
