"""The label database: items, leases, answers, accounts, votes, backups."""
