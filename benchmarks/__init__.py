"""Side by side against what people use today, as ratios measured in one run on one machine; peers
are an extra.

uv run --extra bench python -m benchmarks [NAME ...] [--json PATH] [--data DIR] [--gpu]
"""
