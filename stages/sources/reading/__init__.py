"""What sources share: files on disks and hubs, rows, archives, columns, conditions.

Read `source_kind` first, then `row_ranges`: the rule that no row is ever taken twice.
"""
