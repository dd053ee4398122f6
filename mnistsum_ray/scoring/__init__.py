"""Batch scoring: list -> plan -> read -> predict -> commit -> reconcile."""
