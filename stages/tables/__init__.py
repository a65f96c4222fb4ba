"""The only writers of Lance: what builds bring, what removals delete, training sets, the ledger.

Read `ledger` first, then `committer`.
"""
