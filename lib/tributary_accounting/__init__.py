"""What a training costs in privacy, and the ledger that adds it up. Shared by operator, worker and CLI."""
