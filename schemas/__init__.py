"""What the steps of the pipeline exchange: tables, records, receipts, and the pipeline's settings.

Needs numpy and pyarrow; imports `arrag_runtime.format` only. Read `tables` first.
"""
